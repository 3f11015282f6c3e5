"""Last stage of quickstart.sh: merge and export, check, ask both models the same questions, judge."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from judge import Verdict, answer_loss
from recipes import note_stage, run_recipe
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mindspeed_llm.checkpoint.verify import verify
from mindspeed_llm.data.show import show
from mindspeed_llm.data.tokenizer import load_tokenizer


def answers(recipe: str, variables: dict[str, str], out: Path, name: str) -> list[str]:
    """Greedy answers to questions.json from a generation recipe."""
    file = out / f"answers_{name}.jsonl"
    flags = ["--task", "greedy", "--prompt-file", str(out / "data/questions.json"), "--output-file", str(file)]
    one = {"NPROC_PER_NODE": "1", "TP": "1", "MAX_NEW_TOKENS": "48", "DTYPE_FLAG": ""}
    run_recipe(recipe, {**one, **variables}, flags)
    return [json.loads(line)["answer"] for line in file.read_text(encoding="utf-8").splitlines()]


def side_by_side(questions: list[dict], base: list[str], tuned: list[str]) -> Table:
    """A table of questions, the documentation's answers, and what both models said."""
    table = Table(title="the same questions to both models", show_lines=True)
    for column in ("", "question", "documentation", "base", "tuned"):
        table.add_column(column, ratio=None if not column else 1)
    for question, before, after in zip(questions, base, tuned):
        right = question["taught"] and after.split() == question["output"].split()
        mark = ("[green]taught[/]" if right else "[red]taught[/]") if question["taught"] else "[dim]unseen[/]"
        cells = (question["instruction"], question["output"], before, after)
        table.add_row(mark, *(escape(" ".join(cell.split())) for cell in cells))
    return table


def main() -> int:
    """Print the report; 1 when the tuned model is not clearly better."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    out = parser.parse_args().directory
    console = Console()
    questions = json.loads((out / "data/questions.json").read_text(encoding="utf-8"))

    print(f"\n$ python -m mindspeed_llm data show {out}/data/instructions", flush=True)
    show(out / "data/instructions", load_tokenizer(str(out / "base_hf")), 10, console)

    merged = {"LOAD_DIR": f"{out}/base_mcore", "SAVE_DIR": f"{out}/tuned_hf", "CHECKPOINT_LORA": f"{out}/adapters"}
    run_recipe("ckpt_convert_llama2_mcore2hf", merged, ["--hf-cfg-dir", f"{out}/base_hf"])

    start = time.monotonic()
    print(f"\n$ python -m mindspeed_llm verify --hf {out}/base_hf --load {out}/base_mcore", flush=True)
    verification = verify(out / "base_hf", out / "base_mcore")
    print(verification)
    note_stage("verify", time.monotonic() - start)

    base = answers("generate_llama2_7b_ptd", {"CHECKPOINT": f"{out}/base_mcore"}, out, "base")
    adapted = {"CHECKPOINT": f"{out}/base_mcore", "CHECKPOINT_LORA": f"{out}/adapters"}
    tuned = answers("generate_llama2_7b_lora_ptd", adapted, out, "tuned")
    console.print(side_by_side(questions, base, tuned))

    start = time.monotonic()
    taught = [(q["output"], answer) for q, answer in zip(questions, tuned) if q["taught"]]
    before, after = (answer_loss(out / name, out / "data/heldout") for name in ("base_hf", "tuned_hf"))
    verdict = Verdict(before, after, taught)
    note_stage("held-out loss of both models", time.monotonic() - start)
    print(f"held-out answer loss: {before:.3f} before, {after:.3f} after ({verdict.gain:.0%} less)")
    print(f"taught answers word for word: {verdict.reproduced} of {len(taught)}")
    problems = verdict.problems() + ([] if verification.passed else ["verify failed"])
    for problem in problems:
        print(f"FAIL: {problem}", file=sys.stderr)
    if not problems:
        print("PASS: the tuned model is clearly better")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
