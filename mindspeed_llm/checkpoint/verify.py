"""Does a converted model compute what transformers computes? fp32, layer by layer, with a verdict.

Weights can be equal and outputs differ (eps, RoPE, bias, window); random inputs through both models tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.checkpoint.detect import open_source
from mindspeed_llm.checkpoint.load import load_into
from mindspeed_llm.checkpoint.source import TensorSource
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config import read_hf_config, shape_from_hf
from mindspeed_llm.models.shape import ModelShape

LOGITS_TOLERANCE = 1e-4
"""Largest absolute difference of fp32 logits; rounding alone gives a few 1e-6 on small models."""

LAYER_TOLERANCE = 1e-4
"""Largest difference of a layer's output relative to its largest value, for finding where two models part."""


@dataclass(frozen=True)
class LayerDifference:
    """How far two models are apart at one place.

    Args:
        place: "embedding", "layer 0", ..., "final norm".
        max_diff: largest absolute difference.
        max_value: largest absolute value of the reference.
        cosine: of all values together.
    """

    place: str
    max_diff: float
    max_value: float
    cosine: float

    @property
    def diverges(self) -> bool:
        """Whether it is more than rounding."""
        return not self.max_diff <= LAYER_TOLERANCE * max(self.max_value, 1e-3)


@dataclass(frozen=True)
class VerifyReport:
    """Outcome of `verify`.

    Args:
        layers: one entry per place, in forward order.
        logits_max_diff: over all tokens and the true vocabulary.
        top1_equal, num_tokens: how often both models prefer the same token.
        tolerance: for the logits.
    """

    layers: tuple[LayerDifference, ...]
    logits_max_diff: float
    top1_equal: int
    num_tokens: int
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the two models are the same function up to rounding (NaN fails)."""
        return self.logits_max_diff <= self.tolerance and self.top1_equal == self.num_tokens

    @property
    def exit_code(self) -> int:
        """0 when passed, else 1."""
        return 0 if self.passed else 1

    @property
    def first_divergence(self) -> LayerDifference | None:
        """The earliest place where the models are further apart than rounding explains."""
        return next((layer for layer in self.layers if layer.diverges), None)

    def __str__(self) -> str:
        verdict = "PASS" if self.passed else "FAIL"
        line = f"{verdict}: fp32 logits max|diff| {self.logits_max_diff:.0e}, top-1 {self.top1_equal}/{self.num_tokens}"
        where = self.first_divergence
        if where is None or self.passed:
            return line
        return f"{line}; first diverging: {where.place} (max|diff| {where.max_diff:.1e}, cosine {where.cosine:.6f})"

    def table(self) -> str:
        """One line per place."""
        return "\n".join(f"{d.place:>12}  max|diff| {d.max_diff:.1e}  cosine {d.cosine:.8f}" for d in self.layers)


def verify(
    hf_dir: str | Path,
    other: str | Path | torch.nn.Module | None = None,
    *,
    num_tokens: int = 64,
    seed: int = 0,
    tolerance: float = LOGITS_TOLERANCE,
) -> VerifyReport:
    """Compare a model of ours with transformers' model of a Hugging Face directory, on random tokens.

    Half of the rows sit at positions around twice the context length, where RoPE scaling shows. The models are held
    one after the other, in fp32.

    Args:
        hf_dir: the reference.
        other: a checkpoint of any format, a built model of ours (one rank, fp32), or None for the reference's own
            weights.
        num_tokens: tokens compared altogether, a multiple of 4.
        tolerance: for the logits.

    Raises:
        UserError: a checkpoint cannot be read or does not fit the reference's config.json.
    """
    if num_tokens < 4 or num_tokens % 4:
        raise UserError(f"verify: num_tokens={num_tokens} is wrong; legal: a positive multiple of 4")
    shape = shape_from_hf(read_hf_config(hf_dir))
    batches = _batches(shape, num_tokens, seed)
    reference = _run_transformers(Path(hf_dir), batches)
    model = other if isinstance(other, torch.nn.Module) else _build(open_source(other or hf_dir), shape)
    ours = _run_ours(model, batches, shape)
    places = ["embedding", *(f"layer {i}" for i in range(shape.num_layers - 1)), "final norm"]
    layers = tuple(_difference(p, a, b) for p, a, b in zip(places, reference[:-1], ours[:-1], strict=True))
    logits, expected = ours[-1], reference[-1]
    return VerifyReport(
        layers=layers,
        logits_max_diff=float((logits - expected).abs().max()),
        top1_equal=int((logits.argmax(-1) == expected.argmax(-1)).sum()),
        num_tokens=num_tokens,
        tolerance=tolerance,
    )


def _batches(shape: ModelShape, num_tokens: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(ids, positions), each [2, num_tokens / 4]: at the start, and far out. Apart because some RoPE types look at
    the largest position of the batch."""
    generator = torch.Generator().manual_seed(seed)
    length = num_tokens // 4
    start = max(2 * shape.max_position_embeddings - length, 0)
    batches = []
    for first in (0, start):
        ids = torch.randint(0, shape.vocab_size, (2, length), generator=generator)
        batches.append((ids, torch.arange(first, first + length).expand(2, -1)))
    return batches


def _run_transformers(hf_dir: Path, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Embedding output, each layer's but the last, the final norm's, logits: [4, num_tokens / 4, ...]."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, local_files_only=True
    )
    if bad := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise UserError(
            f"verify: {hf_dir} lacks {bad[0]} and {len(bad) - 1} more tensors for transformers' model; try: --hf "
            "with the complete original"
        )
    model.eval()
    runs = []
    for ids, positions in batches:
        with torch.no_grad():
            out = model(input_ids=ids, position_ids=positions, output_hidden_states=True, use_cache=False)
        runs.append([*out.hidden_states, out.logits])
    return [torch.cat(tensors) for tensors in zip(*runs)]


def _build(source: TensorSource, shape: ModelShape) -> torch.nn.Module:
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.parallel.setup import initialize_distributed

    # The reference's config decides what should be computed; the checkpoint's own what is computed.
    if source.shape.num_layers != shape.num_layers or source.shape.vocab_size != shape.vocab_size:
        raise UserError(
            f"verify: {source.origin} is another model than the reference: {source.shape} and {shape}; try: --hf "
            "with the model that it was made from"
        )
    initialize_distributed()
    model = build_model(source.shape, BuildOptions(params_dtype=torch.float32, initialize=False))
    load_into(model, source)
    return model


def _run_ours(model: Any, batches: list[tuple[Tensor, Tensor]], shape: ModelShape) -> list[Tensor]:
    """As `_run_transformers`, through forward hooks."""
    caught: list[Tensor] = []

    def catch(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        caught.append(hidden.detach().transpose(0, 1).float().cpu())  # [s, b, h] -> [b, s, h]

    hooked = [model.embedding, *list(model.decoder.layers)[:-1], model.decoder.final_layernorm]
    handles = [module.register_forward_hook(catch) for module in hooked]
    was_training = model.training
    device = next(model.parameters()).device
    runs = []
    try:
        model.eval()
        for ids, positions in batches:
            caught.clear()
            with torch.no_grad():
                logits = model(ids.to(device), position_ids=positions.to(device))
            runs.append([*caught, logits[..., : shape.vocab_size].float().cpu()])
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return [torch.cat(tensors) for tensors in zip(*runs)]


def _difference(place: str, reference: Tensor, ours: Tensor) -> LayerDifference:
    if reference.shape != ours.shape:
        raise UserError(f"verify: {place} has shape {list(ours.shape)}, the reference {list(reference.shape)}")
    cosine = torch.nn.functional.cosine_similarity(reference.double().flatten(), ours.double().flatten(), dim=0)
    return LayerDifference(place, float((reference - ours).abs().max()), float(reference.abs().max()), float(cosine))
