"""The Python API of generation: `mindspeed_llm.load_model`, `mindspeed_llm.generate`, `mindspeed_llm.stream`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_llm import accelerator
from mindspeed_llm.errors import UserError

if TYPE_CHECKING:
    from mindspeed_llm.inference.loaded import LoadedModel, Streamer
    from mindspeed_llm.plan.plan import Plan

DTYPES = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}


def load_model(
    path: str | os.PathLike[str],
    lora: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    *,
    lora_weights: Sequence[float] | None = None,
    merge: bool = False,
    prompt_type: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    device: str | None = None,
) -> LoadedModel:
    """Load a model to generate with.

    Args:
        path: HF directory, Megatron checkpoint, a directory written by `--save`, or a hub name.
        lora: adapters (ours or PEFT's) on top of it, or several sets, which are combined.
        lora_weights: of several sets; 1 each when not given.
        merge: add the adapters to the weights instead of computing them beside.
        prompt_type: chat template by name, or "hf" for the tokenizer's own; None takes prompts as raw text.
        tokenizer: directory or file; None takes what lies with the model.
        dtype: "fp32", "bf16" or "fp16", or the torch dtype; None takes the one in config.json (fp32 if it has none).
        device: "cpu", "cuda" or "npu"; None takes the best there is.

    Raises:
        UserError: nothing loadable, an unknown dtype, or adapters that do not fit.
    """
    import torch

    from mindspeed_llm.cli.hub import download_models
    from mindspeed_llm.config.run import RunConfig
    from mindspeed_llm.plan.plan import resolve

    config = RunConfig("inference")
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in DTYPES:
        raise UserError(f"dtype: {dtype} is wrong, because it is no type of weights; legal: fp32, bf16, fp16")
    sets = [lora] if isinstance(lora, str | os.PathLike) else lora
    given = {"load": str(path), "lora_load": [str(each) for each in sets] if sets else None, "lora_merge": merge}
    given |= {"lora_weights": None if lora_weights is None else list(lora_weights)}
    given |= {"prompt_type": prompt_type, "tokenizer_name_or_path": None if tokenizer is None else str(tokenizer)}
    # A program's threads are its own business; as an option they would be set to all cores.
    given |= {"num_threads": torch.get_num_threads(), "device": device or "auto"}
    given |= {DTYPES[name]: True} if name is not None else {}
    for option, value in given.items():
        if value is not None:
            config.set(option, value)
    problems: list[str] = []
    download_models(config, problems)
    return model_from_plan(resolve(config, problems))


def generate(
    model: LoadedModel,
    prompts: str | Sequence[str],
    *,
    system: str | None = None,
    batch_size: int = 8,
    streamer: Streamer | None = None,
    **settings: Any,
) -> list[str]:
    """Answer prompts.

    Args:
        model: from `load_model`.
        prompts: one text or several.
        system: system text of the chat template.
        batch_size: prompts answered together; the answers do not depend on it.
        streamer: `streamer(number of the prompt, piece)` is called with each piece of text as it is made.
        settings: fields of `inference.settings.GenerationSettings`: max_new_tokens, do_sample, temperature, top_k,
            top_p, repetition_penalty, num_beams, length_penalty, stop_strings, seed, ...

    Returns:
        The answers, without the prompts and without what ended them.

    Raises:
        UserError: an unknown setting or a value without meaning, or a prompt that is too long.
    """
    answers: dict[int, list[str]] = {}
    for number, piece in _pieces(model, prompts, system, batch_size, settings):
        answers.setdefault(number, []).append(piece)
        if streamer is not None:
            streamer(number, piece)
    count = 1 if isinstance(prompts, str) else len(prompts)
    return ["".join(answers.get(number, [])) for number in range(count)]


def stream(model: LoadedModel, prompt: str, *, system: str | None = None, **settings: Any) -> Iterator[str]:
    """The answer to one prompt, piece by piece; arguments as in `generate`."""
    for _, piece in _pieces(model, prompt, system, 1, settings):
        yield piece


def _pieces(
    model: LoadedModel, prompts: str | Sequence[str], system: str | None, batch_size: int, settings: dict[str, Any]
) -> Iterator[tuple[int, str]]:
    from mindspeed_llm.inference.loaded import LoadedModel
    from mindspeed_llm.inference.settings import GenerationSettings

    if not isinstance(model, LoadedModel):
        kind = type(model).__name__
        raise UserError(
            f"generate: model is a {kind}, not what load_model returns; try: generate(load_model(DIR), ...)"
        )
    known = [f.name for f in dataclasses.fields(GenerationSettings)]
    if unknown := sorted(set(settings) - set(known)):
        raise UserError(f"generate: {', '.join(unknown)} is unknown; legal: {', '.join(known)}")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    ids = [model.encode(text, system) for text in texts]
    return model.stream(ids, GenerationSettings(**settings), batch_size)


def model_from_plan(plan: Plan) -> LoadedModel:
    """Start processes if none are, build the plan's model, load weights and adapters, tokenizer and template.

    Raises:
        UserError: a layout that cannot generate, or a missing tokenizer.
    """
    check_layout(plan)
    settle_precision(plan)
    from mindspeed_llm.data.templates import load_template
    from mindspeed_llm.data.tokenizer import load_tokenizer

    accelerator.show_to_megatron(plan.config.runtime.device)
    from mindspeed_llm.inference.loaded import LoadedModel, recorded_stop_tokens

    config, t = plan.config, plan.config.tokenizer
    if plan.tokenizer is None:
        raise UserError("--tokenizer-name-or-path is missing: nothing with the model says how text becomes tokens")
    tokenizer = load_tokenizer(
        plan.tokenizer, t.tokenizer_type, not t.tokenizer_not_use_fast, trust_remote_code=t.trust_remote_code
    )
    if tokenizer.vocab_size > plan.shape.vocab_size:
        raise UserError(
            f"tokenizer: {plan.tokenizer} has {tokenizer.vocab_size} tokens and the model {plan.shape.vocab_size}; "
            "legal: a tokenizer that fits the model"
        )
    name = config.data.prompt_type
    template = None if name is None else load_template(name, tokenizer, config.data.prompt_type_path)
    stops = recorded_stop_tokens(tokenizer, Path(plan.hf_files) if plan.hf_files else None)
    if template is not None:
        stops = (*dict.fromkeys([*template.stop_token_ids(), *stops]),)
    model, shelf = _weights(plan)
    return LoadedModel(model, tokenizer, template, stops, shelf)


def settle_precision(plan: Plan) -> None:
    """Where no type was asked for, take the checkpoint's own: the one in its config.json, fp32 if it has none.

    Raises:
        UserError: several types were asked for.
    """
    runtime = plan.config.runtime
    asked = [name for name in ("bf16", "fp16", "fp32") if getattr(runtime, name)]
    if len(asked) > 1:
        raise UserError(f"--{' and --'.join(asked)} exclude each other; give one")
    if asked or plan.hf_files is None:
        return
    record = json.loads((plan.hf_files / "config.json").read_text(encoding="utf-8"))
    name = DTYPES.get(str(record.get("dtype") or record.get("torch_dtype")), "fp32")
    setattr(runtime, name, True)


def check_layout(plan: Plan) -> None:
    """Refuse layouts that generation has no use for."""
    tp, pp = plan.tensor_parallel_size, plan.pipeline_parallel_size
    if pp > 1:
        raise UserError(
            f"--pipeline-model-parallel-size: {pp} is wrong, because generation passes each token through all layers "
            f"of one stage; legal: 1; try: --tensor-model-parallel-size {tp * pp}"
        )
    if plan.world_size != tp:
        raise UserError(
            f"launch: {plan.world_size} processes for tensor parallel {tp} would answer each prompt "
            f"{plan.world_size // tp} times; legal: {tp} processes"
        )


def _weights(plan: Plan) -> tuple[Any, Any]:
    """The model, and its sets of adapters where several may be used."""
    from mindspeed_llm.lora.fusion.configure import configure_fusion
    from mindspeed_llm.lora.inject import inject_adapters
    from mindspeed_llm.lora.io import load_adapters, merge_adapters
    from mindspeed_llm.models.build import build_model
    from mindspeed_llm.training.build_options import build_options
    from mindspeed_llm.training.setup import load_weights, say_adapters, start_processes

    start_processes(plan)
    options = dataclasses.replace(build_options(plan, initialize=False), sequence_parallel=False)
    model = build_model(plan.shape, options)
    load_weights(plan, [model])
    model.requires_grad_(False)
    shelf = None
    if plan.adapters is not None and plan.adapter_source is not None:
        lora = plan.config.lora
        if plan.further_adapters or lora.lora_weights is not None:
            shelf = _shelf(plan, model)
            say_adapters(f"{1 + len(plan.further_adapters)} sets of adapters", plan)
        else:
            inject_adapters(model, plan.adapters, seed=plan.config.data.seed)
            where, kind = plan.adapter_source.directory, plan.adapter_source.format
            say_adapters(f"{load_adapters(model, where, kind, plan.adapters)} adapter tensors", plan)
        configure_fusion([model], fused=lora.lora_fusion, combine=lora.lora_fusion_combine, chunks=1)
        if lora.lora_merge:
            merge_adapters(model)
            shelf = None
    return model.eval(), shelf


def _shelf(plan: Plan, model: Any) -> Any:
    """The model's sets of adapters, in use with the weights that are asked for."""
    from mindspeed_llm.lora.combine import AdapterShelf, combined_settings, read_set
    from mindspeed_llm.lora.inject import inject_adapters

    sources = [(plan.adapter_source, plan.adapters), *plan.further_adapters]
    sets = [read_set(source, settings, plan.shape) for source, settings in sources]
    weights = plan.config.lora.lora_weights or [1.0] * len(sets)
    settings = combined_settings(sets, plan.shape)
    inject_adapters(model, settings, seed=plan.config.data.seed)
    shelf = AdapterShelf(model, sets, settings)
    shelf.use(dict(zip(shelf.names, weights)))
    return shelf
