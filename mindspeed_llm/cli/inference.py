"""`inference.py`: answers, a demonstration of all ways of decoding, and chat."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from mindspeed_llm.cli.door import open_door, say_notes
from mindspeed_llm.cli.places import unwritable_places
from mindspeed_llm.config.inference import InferenceConfig
from mindspeed_llm.config.lora import weight_problems
from mindspeed_llm.config.parser import Parsed
from mindspeed_llm.config.run import RunConfig
from mindspeed_llm.models.shape import ModelShape

WHAT = "Answer prompts with a trained or tuned model, or chat with it."

# Upstream's demonstration: every way of decoding on this prompt, then chat.
DEMONSTRATION = ("greedy", "do_sample", "beam_search", "beam_search_with_sampling", "chat")
DRAWING = ("do_sample", "beam_search_with_sampling", "chat")
DEFAULT_PROMPT = "how are you?"
TITLES = {
    "greedy": "Greedy Search",
    "do_sample": "Sampling",
    "beam_search": "Beam Search",
    "beam_search_with_sampling": "Beam Search With Sampling",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door; returns the exit status."""
    return open_door("inference", WHAT, argv, run)


def run(parsed: Parsed) -> int:
    """Do the tasks of the command line."""
    from mindspeed_llm.api import check_layout, model_from_plan, settle_precision
    from mindspeed_llm.cli.hub import download_models
    from mindspeed_llm.plan.plan import resolve
    from mindspeed_llm.plan.show import show_plan

    config = parsed.config
    problems = [*parsed.problems, *_problems(config)]
    if config.inference.hf_chat_template:
        config.data.prompt_type = "hf"
    download_models(config, problems)
    plan = resolve(config, problems)
    check_layout(plan)
    settle_precision(plan)
    prompts = _prompts(config)
    say_notes([*parsed.notes, *plan.notes, *_beyond_the_context(config, plan.shape)])
    if config.logging.dry_run:
        show_plan(plan)
        return 0
    model = model_from_plan(plan)
    end_tokens = tuple(_token_id(model.tokenizer, token) for token in config.inference.add_eos_token or ())
    try:
        for task in config.inference.task or DEMONSTRATION:
            if task == "chat":
                _chat(model, config, end_tokens)
            else:
                _answer(model, config, task, prompts, end_tokens)
    except KeyboardInterrupt:
        _write("\n")
        return 130
    return 0


def _problems(config: RunConfig) -> list[str]:
    """What contradicts itself on the command line."""
    i, lora = config.inference, config.lora
    problems = []
    tasks = [task for task in i.task or DEMONSTRATION if task != "chat"]
    if i.output_file and len(tasks) != 1:
        problems.append("--output-file takes the answers of one way of decoding; try: --task greedy")
    if i.hf_chat_template and config.data.prompt_type not in (None, "hf"):
        problems.append(f"--hf-chat-template and --prompt-type {config.data.prompt_type} exclude each other; give one")
    if i.system is not None and config.data.prompt_type is None and not i.hf_chat_template:
        problems.append("--system has no meaning without --prompt-type: raw prompts have no system text")
    problems += weight_problems(lora)
    if lora.lora_load is None and config.checkpoint.load is not None:
        from mindspeed_llm.plan.combinations import OF_ADAPTERS

        given = [n for n in ("lora_r", "lora_target_modules", *OF_ADAPTERS) if n in config.given]
        flags = ", ".join("--" + n.replace("_", "-") for n in given)
        if given:
            problems.append(f"{flags} have no meaning without --lora-load: there are no adapters to answer with")
    problems += _without_meaning(config)
    problems += unwritable_places(config)
    searches = any(task.startswith("beam") for task in tasks)
    if searches and i.num_beams < 2:
        problems.append(f"--num-beams: {i.num_beams} is wrong, because beam search keeps several; legal: 2 or more")
    return problems


def _beyond_the_context(config: RunConfig, shape: ModelShape) -> list[str]:
    """Lengths that were asked for and that the model has no positions for."""
    from mindspeed_llm.inference.engine import context_length

    longest = context_length(shape)
    asked = {name: config.get(name) for name in ("max_new_tokens", "max_length", "seq_length") if name in config.given}
    return [
        f"--{name.replace('_', '-')}: the model has {longest} positions, prompt included; answers end there"
        for name, tokens in asked.items()
        if tokens > longest
    ]


def _without_meaning(config: RunConfig) -> list[str]:
    """Options that none of the tasks reads."""
    tasks = set(config.inference.task or DEMONSTRATION)
    unread = {
        "a task that draws (do_sample, beam_search_with_sampling, chat)": (DRAWING, ("temperature", "top_k", "top_p")),
        "beam search": (("beam_search", "beam_search_with_sampling"), ("num_beams", "length_penalty")),
        "a task other than chat": (set(DEMONSTRATION) - {"chat"}, ("prompt", "prompt_file")),
        "chat": (("chat",), ("history_turns",)),
    }
    return [
        f"--{name.replace('_', '-')} has no meaning without {needed}"
        for needed, (readers, names) in unread.items()
        if not tasks & set(readers)
        for name in names
        if name in config.given
    ]


def _prompts(config: RunConfig) -> list[str]:
    from mindspeed_llm.inference.prompts import read_prompts

    i = config.inference
    given = [*(i.prompt or ()), *(read_prompts(i.prompt_file) if i.prompt_file else ())]
    return given or [DEFAULT_PROMPT]


def _token_id(tokenizer: Any, token: str) -> int:
    from mindspeed_llm.errors import UserError

    index = tokenizer.convert_tokens_to_ids(token)
    if index is None:
        raise UserError(f"--add-eos-token: {token!r} is wrong, because '{tokenizer.source}' has no such token")
    return index


def settings_of(config: RunConfig, task: str, end_tokens: tuple[int, ...] = ()):
    """The GenerationSettings of a task; chat draws, as upstream's."""
    from mindspeed_llm.inference.settings import GenerationSettings

    i: InferenceConfig = config.inference
    limits = [n for n in (i.max_length, config.data.seq_length) if n is not None]
    return GenerationSettings(
        max_new_tokens=i.max_new_tokens,
        max_length=min(limits, default=None),
        do_sample=task in DRAWING,
        temperature=i.temperature,
        top_k=i.top_k,
        top_p=i.top_p,
        repetition_penalty=i.repetition_penalty,
        num_beams=i.num_beams if task.startswith("beam") else 1,
        length_penalty=i.length_penalty,
        stop_token_ids=end_tokens,
        stop_strings=tuple(i.stop or ()),
        use_kv_cache=i.use_kv_cache,
        seed=config.data.seed,
    )


def _answer(model: Any, config: RunConfig, task: str, prompts: list[str], end_tokens: tuple[int, ...]) -> None:
    """Answer the prompts in batches and print them in upstream's form, or write them to --output-file."""
    from mindspeed_llm.inference.prompts import write_answers

    i, batch_size = config.inference, config.training.micro_batch_size
    settings = settings_of(config, task, end_tokens)
    encoded = [model.encode(prompt, i.system) for prompt in prompts]
    if i.output_file:
        started = time.perf_counter()
        answers = model.answer(encoded, settings, batch_size)
        if _speaks():
            write_answers(i.output_file, prompts, answers)
        _write(f"{len(answers)} answers in {i.output_file}\nElapsed: {time.perf_counter() - started:.2f}s\n")
        return
    _write(f"\n=============== {TITLES[task]} ===============\n")
    for first in range(0, len(prompts), batch_size):
        _answer_batch(model, settings, prompts, encoded, range(first, min(first + batch_size, len(prompts))), i.stream)


def _answer_batch(
    model: Any, settings: Any, prompts: list[str], encoded: list[list[int]], batch: range, streamed: bool
) -> None:
    """Answer and print some prompts; one alone can be streamed."""
    started = time.perf_counter()
    streamed = streamed and len(batch) == 1
    if streamed:
        _write(f"\nYou:\n{prompts[batch[0]]}\n\nMindSpeed-LLM:\n")
    streamer = (lambda _, piece: _write(piece)) if streamed else None
    answers = model.answer([encoded[n] for n in batch], settings, len(batch), streamer, first=batch[0])
    if streamed:
        _write("\n")
    else:
        for number, answer in zip(batch, answers):
            _write(f"\nYou:\n{prompts[number]}\n\nMindSpeed-LLM:\n{answer}\n")
    _write(f"\nElapsed: {time.perf_counter() - started:.2f}s\n")


def _chat(model: Any, config: RunConfig, end_tokens: tuple[int, ...]) -> None:
    from mindspeed_llm.inference.chat import History, chat

    i = config.inference
    chat(
        model,
        settings_of(config, "chat", end_tokens),
        History(i.history_turns, i.system),
        _read,
        _write,
        streamed=i.stream,
    )


def _speaks() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _write(text: str) -> None:
    if _speaks():
        print(text, end="", flush=True)


def _read(prompt: str) -> str | None:
    """The line that rank 0 reads, on every rank; None at the end of input."""
    import torch.distributed as dist

    line: list[str | None] = [None]
    if _speaks():
        try:
            line[0] = input(prompt)
        except EOFError:
            pass
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(line, src=0)
    return line[0]
