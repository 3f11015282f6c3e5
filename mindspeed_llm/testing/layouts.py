"""A few training steps at some parallel layout, with every gradient gathered: does the layout train the same model?

    found = pool(4).run(train, str(directory), "--tensor-model-parallel-size 2", make_rows(8))[0]
    alone = pool(1).run(train, str(directory), "", make_rows(8))[0]
    assert_same(found, alone)

The steps are those of the training doors: plan, `training.setup.build`, `TrainingData`'s micro-batches, and
`TrainingLoop.step`; only the optimizer is replaced, by one that looks at the gradients first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm.config.parser import parse
from mindspeed_llm.data.record import IGNORE_INDEX
from mindspeed_llm.data.samplers import GlobalBatchSampler
from mindspeed_llm.models.layouts import layout_of, unshard
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.models.tensor_names import held_experts
from mindspeed_llm.parallel.layout import Coordinates
from mindspeed_llm.parallel.shards import local_values, shard_of
from mindspeed_llm.plan.plan import Plan, resolve
from mindspeed_llm.testing.mutations import MUTATIONS
from mindspeed_llm.training.data import DataPart, TrainingData
from mindspeed_llm.training.loop import Progress, TrainingLoop
from mindspeed_llm.training.run import make_optimizer
from mindspeed_llm.training.saving import Saver
from mindspeed_llm.training.setup import build, gather_parameters, placement, start_processes

EMBEDDING, OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"
# Copies of a tensor on several ranks are reduced by the same collective, or computed by the same operations.
COPIES_AGREE = 1e-6

Row = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass
class Trained:
    """What some steps gave.

    Attributes:
        losses, trained_tokens: of each step, the same on every rank.
        norms: of the gradient, of each step (AdamW; plain gradient descent clips nothing and has none).
        gradients: of each step (AdamW: of the first), by megatron-core's names in the whole model, unsharded and
            unpadded; on rank 0, nothing elsewhere.
        weights: likewise, after the last step.
    """

    losses: list[float]
    trained_tokens: list[int]
    gradients: list[Tensors] = field(default_factory=list)
    weights: Tensors = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)


def make_rows(
    count: int, *, vocab_size: int = 997, longest: int = 24, documents: int = 1, equal: bool = False, seed: int = 5
) -> list[Row]:
    """Samples as `SFTDataset.sample` gives them, of uneven lengths and with unevenly many trained tokens.

    Args:
        documents: of each row; their lengths differ.
        equal: every document has `longest` tokens, for a pre-training door.
        seed: of lengths, tokens and labels.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    rows = []
    for _ in range(count):
        lengths = [longest if equal else draw(3, longest) for _ in range(documents)]
        ids = torch.randint(0, vocab_size, (sum(lengths),), generator=generator)
        labels = torch.full_like(ids, IGNORE_INDEX)
        end = 0
        for length in lengths:
            start, end = end, end + length
            prompt = 0 if equal else draw(0, length - 2)
            labels[start + prompt : end - 1] = ids[start + prompt + 1 : end]
        rows.append({"input_ids": ids.numpy(), "labels": labels.numpy(), "segment_lengths": lengths})
    return rows


def train(
    model: str,
    flags: str,
    rows: Sequence[Row],
    steps: int = 3,
    optimizer: str = "sgd",
    learning_rate: float = 0.1,
    door: str = "posttrain",
    mutation: str | None = None,
) -> Trained:
    """Train on this rank of a pool; every step sees all rows, as one global batch.

    Args:
        model: what `--load` says.
        flags: the layout and whatever else, as on a command line. Give `--micro-batch-size`, `--no-padding-free`,
            `--lora-r` and the like here; with `--save` (AdamW) a checkpoint is written after every step.
        optimizer: "sgd" (plain, at `learning_rate`), or "adamw" for the doors' own with these flags.
        mutation: name of an entry of `testing.mutations.MUTATIONS`, for a negative control.

    Raises:
        UserError: what the plan refuses.
        AssertionError: copies of a tensor differ between ranks.
    """
    with mock.patch.dict(os.environ, _environment()):
        plan = _plan(model, flags, len(rows), steps, door)
        start_processes(plan)
    with MUTATIONS[mutation]() if mutation else nullcontext():
        built = build(plan)
        data = _GivenRows(plan, rows)
        inner, scheduler = make_optimizer(plan, built, steps)
        recorder = _Recorder(plan, built, inner if optimizer == "adamw" else None, learning_rate)
        loop = TrainingLoop(plan, built, recorder, scheduler, data, None, Progress(), steps, None)
        saver = Saver(plan, built, inner, scheduler, data) if plan.config.checkpoint.save else None
        results = []
        for _ in range(steps):
            results.append(loop.step())
            if saver:
                saver(loop.progress)
        if saver:
            saver.finish()
        gather_parameters(built)
        parameters = {p: local_values(p) for chunk in built.chunks for p in chunk.parameters()}
        weights = gather(plan, built.chunks, parameters)
    losses, trained_tokens = [r.loss for r, _ in results], [r.trained_tokens for r, _ in results]
    return Trained(losses, trained_tokens, recorder.gradients, weights, [norm for _, norm in results])


def _environment() -> dict[str, str]:
    world = str(dist.get_world_size())
    return {"WORLD_SIZE": world, "RANK": str(dist.get_rank()), "LOCAL_WORLD_SIZE": world}


def _plan(model: str, flags: str, num_rows: int, steps: int, door: str) -> Plan:
    words = f"--load {model} --train-iters {steps} --global-batch-size {num_rows} --num-threads 1 --eval-iters 0 "
    parsed = parse(door, (words + flags).split())
    return resolve(parsed.config, parsed.problems)


class _GivenRows(TrainingData):
    """Training data that are these rows, in this order."""

    packed = False

    def __init__(self, plan: Plan, rows: Sequence[Row]) -> None:
        self.rows = rows
        super().__init__(plan, ["rows of a test"], pad_token_id=0)

    def _part(self, name: str, shuffle: bool) -> DataPart:
        return DataPart(self, GlobalBatchSampler(len(self.rows), self.plan.global_batch_size, shuffle=False))

    def sample(self, index: int) -> Row:
        return self.rows[index]

    def fingerprint(self) -> dict[str, Any]:
        return {"samples": len(self.rows)}


class _Recorder:
    """An optimizer that gathers the gradients before its step: plain gradient descent, or another one."""

    def __init__(self, plan: Plan, model: Any, inner: Any | None, learning_rate: float) -> None:
        self.plan, self.model, self.inner, self.learning_rate = plan, model, inner, learning_rate
        self.gradients: list[Tensors] = []
        self.param_groups = [{"params": [0], "lr": learning_rate}]

    def zero_grad(self) -> None:
        if self.inner is not None:
            self.inner.zero_grad()

    @property
    def chained_optimizers(self) -> list[Any]:
        """Parts whose gradients are clipped; plain gradient descent clips nothing."""
        return [] if self.inner is None else self.inner.chained_optimizers

    def prepare_grads(self) -> bool:
        """Gather what the first (of plain gradient descent, every) step starts from."""
        for wrapped in self.model.wrapped:
            complete_gradients(wrapped)
        if self.inner is None or not self.gradients:
            self.gradients.append(gather(self.plan, self.model.chunks, self._gradients()))
        return False if self.inner is None else self.inner.prepare_grads()

    def get_grad_norm(self) -> float:
        return 1.0 if self.inner is None else self.inner.get_grad_norm()

    def step_with_ready_grads(self) -> bool:
        if self.inner is not None:
            return self.inner.step_with_ready_grads()
        with torch.no_grad():
            for parameter, gradient in self._gradients().items():
                values = local_values(parameter)
                values -= self.learning_rate * gradient
        return True

    def _gradients(self) -> dict[Tensor, Tensor]:
        return {p: p.main_grad for chunk in self.model.chunks for p in chunk.parameters() if p.requires_grad}


@torch.no_grad()
def complete_gradients(wrapped: torch.nn.Module) -> None:
    """Give every rank the whole reduced gradient, of which the distributed optimizer leaves each rank its share."""
    if not wrapped.ddp_config.use_distributed_optimizer:
        return
    for group in wrapped.bucket_groups + wrapped.expert_parallel_bucket_groups:
        ranks = group.intra_distributed_optimizer_instance_size
        for bucket in group.buckets:
            share = bucket.grad_data.chunk(ranks)[group.intra_distributed_optimizer_instance_rank].clone()
            dist.all_gather_into_tensor(bucket.grad_data, share, group=group.intra_distributed_optimizer_instance_group)


def gather(plan: Plan, chunks: Sequence[torch.nn.Module], values: Mapping[Tensor, Tensor]) -> Tensors:
    """Whole tensors on rank 0 from all ranks' `values` of their parameters; nothing on the other ranks."""
    here = plan.layout.coordinates(dist.get_rank())
    local: Tensors = {}
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            if parameter in values:
                value = _joined(parameter, values[parameter].float().cpu().clone())
                local |= _by_whole_names(name, value, plan, number)
    everything = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object((here, local), everything)
    return assemble(everything, plan.shape) if everything is not None else {}


def _joined(parameter: Tensor, value: Tensor) -> Tensor:
    """The whole of what data-parallel ranks hold parts of."""
    if shard_of(parameter) is None:
        return value
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    parts = [None] * group.size()
    dist.all_gather_object(parts, value, group=group)
    return torch.cat(parts)


def _by_whole_names(name: str, value: Tensor, plan: Plan, chunk: int) -> Tensors:
    """A parameter of one of this rank's model chunks by its name in the whole model, stacked experts one by one."""
    here = placement(plan, chunk)
    name = here.global_name(name)
    experts = held_experts(name, (plan.shape.num_moe_experts or 0) // here.ep, here.ep_rank)
    if experts is None:
        return {name: value}
    slices = value.chunk(len(experts))
    if ".lora_magnitude." in name:
        slices = [part.flatten() for part in slices]
    slices = [part.flatten(0, -2) if part.dim() > 2 else part for part in slices]
    return dict(zip(experts, slices, strict=True))


def assemble(parts: Sequence[tuple[Coordinates, Tensors]], shape: ModelShape) -> Tensors:
    """Whole, unpadded tensors from every rank's tensors by their names in the whole model.

    Raises:
        AssertionError: copies of a tensor differ.
    """
    slices: dict[str, dict[int, Tensor]] = {}
    for here, tensors in parts:
        for name, tensor in tensors.items():
            number = here.etp if layout_of(_linear_of(name)).expert else here.tp
            known = slices.setdefault(name, {}).setdefault(number, tensor)
            _check_copies(name, known, tensor)
    whole = {name: _whole(name, [tensors[i] for i in sorted(tensors)], shape) for name, tensors in slices.items()}
    if shape.tie_word_embeddings and OUTPUT_LAYER in whole:
        _check_copies("tied embeddings", whole[EMBEDDING], whole.pop(OUTPUT_LAYER))
    return whole


def _whole(name: str, tensors: list[Tensor], shape: ModelShape) -> Tensor:
    dim, factor = layout_of(_linear_of(name)).tp_dim, name.partition(".lora_")[2][:1]
    if factor and name.startswith(EMBEDDING.removesuffix("weight")):
        dim = 1  # what is looked up has its tokens in A
    # Of a column-parallel linear B and magnitudes are cut by rows, of a row-parallel one A by its columns.
    if dim is None or (factor and (factor == "A") == (dim == 0)):
        for copy in tensors[1:]:
            _check_copies(name, tensors[0], copy)
        return tensors[0]
    if not factor:
        return unshard(tensors, name, shape)
    whole = torch.cat(tensors, dim)
    return whole.narrow(dim, 0, shape.vocab_size) if layout_of(_linear_of(name)).packing == "vocab" else whole


def _linear_of(name: str) -> str:
    """The weight whose layout a tensor follows: a LoRA factor its linear's, any other its own."""
    path, lora, _ = name.partition(".lora_")
    return path + ".weight" if lora else name


def _check_copies(name: str, one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape, f"{name} has {tuple(one.shape)} and {tuple(other.shape)} on different ranks"
    difference = float((one - other).abs().max())
    assert difference <= COPIES_AGREE * float(one.abs().max()), f"{name} differs between ranks by {difference:.3g}"


@dataclass(frozen=True)
class Difference:
    """How far two trainings are apart.

    Attributes:
        loss: largest |d| / loss over the steps.
        gradients: largest max|d| / max|g| over the steps, by tensor; that of step k counts as its k-th part, since the
            weights of two layouts differ by rounding from the second step on, and training amplifies that.
    """

    loss: float
    gradients: dict[str, float]

    @property
    def gradient(self) -> float:
        """The largest of all tensors."""
        return max(self.gradients.values())

    def __str__(self) -> str:
        worst = sorted(self.gradients, key=self.gradients.get, reverse=True)[:3]
        listed = ", ".join(f"{name} {self.gradients[name]:.2g}" for name in worst)
        return f"losses differ by {self.loss:.2g}, gradients most in {listed}"


def compare(found: Trained, expected: Trained) -> Difference:
    """The differences of two trainings on the same rows.

    Raises:
        AssertionError: they have other tensors, or trained other numbers of tokens.
    """
    assert found.trained_tokens == expected.trained_tokens, (found.trained_tokens, expected.trained_tokens)
    loss = max(abs(a - b) / abs(b) for a, b in zip(found.losses, expected.losses, strict=True))
    gradients: dict[str, float] = {}
    for number, (step, whole) in enumerate(zip(found.gradients, expected.gradients, strict=True), start=1):
        odd = sorted(step.keys() ^ whole.keys())
        assert not odd, f"only one of the two has {', '.join(odd[:5])}"
        for name, tensor in whole.items():
            gradients[name] = max(gradients.get(name, 0.0), _ratio(step[name], tensor) / number)
    return Difference(loss, gradients)


def _ratio(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    # An expert that no token chose has no gradient: nothing to divide by, and only zero is right.
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def assert_same(found: Trained, expected: Trained, loss: float = 1e-5, gradient: float = 1e-5) -> None:
    """Fail unless losses and gradients agree; the message names the tensors that differ most."""
    difference = compare(found, expected)
    assert difference.loss < loss and difference.gradient < gradient, str(difference)
