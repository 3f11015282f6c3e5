"""`python -m mindspeed_llm COMMAND`: the small tools around the doors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mindspeed_llm.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except UserError as wrong:
        print("error: " + str(wrong), file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mindspeed_llm", description=__doc__.split(":")[1].strip())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("doctor", help="versions, devices, chosen operators, what is missing")
    command.set_defaults(run=_doctor)

    command = commands.add_parser("verify", help="compare a checkpoint with its Hugging Face model, layer by layer")
    command.add_argument("--hf", required=True, metavar="DIR", help="the Hugging Face directory to compare with")
    command.add_argument("--load", metavar="DIR", help="checkpoint of any format; default: the same HF directory")
    command.add_argument("--layers", action="store_true", help="print every layer's difference")
    command.set_defaults(run=_verify)

    checkpoint = commands.add_parser("checkpoint", help="the checkpoints in a directory").add_subparsers(
        required=True, metavar="WHAT"
    )
    command = checkpoint.add_parser("list", help="a table of them: complete, healthy, size, layout")
    command.add_argument("directory")
    command.set_defaults(run=_list_checkpoints)
    command = checkpoint.add_parser("verify", help="compare all files with their checksums; status 1 if any differs")
    command.add_argument("directory")
    command.set_defaults(run=_verify_checkpoints)
    command = checkpoint.add_parser("prune", help="remove all but the newest")
    command.add_argument("directory")
    command.add_argument("--keep-last", type=int, required=True, metavar="N")
    command.set_defaults(run=_prune_checkpoints)

    data = commands.add_parser("data", help="look at preprocessed data").add_subparsers(required=True, metavar="WHAT")
    command = data.add_parser("show", help="rows with the trained tokens coloured")
    command.add_argument("data_path", nargs="+", help="as --data-path: a prefix, or several, with weights or without")
    command.add_argument("--tokenizer", metavar="DIR", help="decode with this tokenizer; default: print ids")
    command.add_argument("--count", type=int, default=10, help="rows of each data set (default 10)")
    command.set_defaults(run=_show_data)

    models = commands.add_parser("models", help="model families").add_subparsers(required=True, metavar="WHAT")
    command = models.add_parser("list", help="the families and the model types they read")
    command.set_defaults(run=_list_models)
    command = models.add_parser("toy", help="write a tiny random checkpoint with a tokenizer")
    command.add_argument("family", help="model type, e.g. llama, mistral, qwen2, qwen3")
    command.add_argument("directory")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=_toy)

    patches = commands.add_parser("patches", help="what is changed in megatron-core").add_subparsers(
        required=True, metavar="WHAT"
    )
    command = patches.add_parser("list", help="every patch: target, kind, condition, whether it is in force")
    command.set_defaults(run=_list_patches)
    command = patches.add_parser("why", help="one patch: its reason, what it was written against, where it is bound")
    command.add_argument("target", help="the patch's name, or what it changes (package.module:Symbol, or Symbol)")
    command.set_defaults(run=_why_patch)
    command = patches.add_parser("check", help="compare every target with the source its patch was written against")
    command.add_argument("--megatron-core", metavar="VERSION", help="fetch and read this release; default: installed")
    command.set_defaults(run=_check_patches)

    command = commands.add_parser("watch", help="a running or finished training in the terminal, or as a picture")
    command.add_argument("place", metavar="DIR", help="the --save directory of the run, or its --metrics-jsonl file")
    command.add_argument("--once", action="store_true", help="print and exit; the default without a terminal")
    command.add_argument("--png", metavar="FILE", help="write the curves to this picture and exit")
    command.set_defaults(run=_watch)

    trace = commands.add_parser("trace", help="what --profile wrote").add_subparsers(required=True, metavar="WHAT")
    command = trace.add_parser(
        "summarize", help="time by phase, part of the model and operator; communication hidden and exposed; over ranks"
    )
    command.add_argument("places", nargs="+", metavar="DIR|FILE", help="the --profile-save-path, or traces of one run")
    command.add_argument("--html", metavar="FILE", help="write a page with timelines too")
    command.set_defaults(run=_summarize_traces)

    command = commands.add_parser("flags", help="every option as the text of docs/flags.md")
    command.set_defaults(run=_flags)
    return parser


def _doctor(_: argparse.Namespace) -> int:
    from mindspeed_llm.cli.doctor import doctor

    return doctor()


def _verify(arguments: argparse.Namespace) -> int:
    from mindspeed_llm.checkpoint.verify import verify

    report = verify(arguments.hf, arguments.load)
    if arguments.layers:
        print(report.table())
    print(report)
    return report.exit_code


def _list_checkpoints(arguments: argparse.Namespace) -> int:
    from mindspeed_llm.cli.checkpoint import list_checkpoints

    return list_checkpoints(arguments.directory)


def _verify_checkpoints(arguments: argparse.Namespace) -> int:
    from mindspeed_llm.cli.checkpoint import verify_checkpoints

    return verify_checkpoints(arguments.directory)


def _prune_checkpoints(arguments: argparse.Namespace) -> int:
    from mindspeed_llm.cli.checkpoint import prune_checkpoints

    return prune_checkpoints(arguments.directory, arguments.keep_last)


def _show_data(arguments: argparse.Namespace) -> None:
    from mindspeed_llm.data.blend import parse_data_path
    from mindspeed_llm.data.show import show
    from mindspeed_llm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    for source in parse_data_path(arguments.data_path):
        show(source.path, tokenizer, arguments.count, weight=source.weight)


def _list_models(_: argparse.Namespace) -> None:
    from mindspeed_llm.models.family import all_families

    for family in all_families().values():
        print(f"{family.name:<10}{', '.join(variant.model_type for variant in family.variants)}")


def _toy(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from mindspeed_llm.checkpoint.space import writing_problem
    from mindspeed_llm.checkpoint.toy import make_toy

    if problem := writing_problem(Path(arguments.directory), "directory"):
        raise UserError(problem)
    made = make_toy(arguments.family, arguments.directory, seed=arguments.seed, published_tokens=True)
    print(f"wrote {made}")


def _list_patches(_: argparse.Namespace) -> None:
    from mindspeed_llm.cli import patches

    patches.list_patches()


def _why_patch(arguments: argparse.Namespace) -> None:
    from mindspeed_llm.cli import patches

    patches.why(arguments.target)


def _check_patches(arguments: argparse.Namespace) -> int:
    from mindspeed_llm.cli import patches

    return patches.check(arguments.megatron_core)


def _watch(arguments: argparse.Namespace) -> int:
    from mindspeed_llm.cli.watch import watch

    return watch(arguments.place, arguments.once, arguments.png)


def _summarize_traces(arguments: argparse.Namespace) -> int:
    from mindspeed_llm.cli.trace import summarize_traces

    return summarize_traces(arguments.places, arguments.html)


def _flags(_: argparse.Namespace) -> None:
    from mindspeed_llm.config.help import flags_markdown

    print(flags_markdown(), end="")


if __name__ == "__main__":
    sys.exit(main())
