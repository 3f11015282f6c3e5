"""One rank of a run of any size, on one machine: its part of the model without memory, and a step of a small model.

The process group is torch's fake one: collectives return at once, with whatever numbers, so that groups, shapes and the
schedule are real and the loss means nothing. The full-size part is built on the meta device and counted; then a model
of the same layout with the same layers, heads and experts, but narrow, takes one training step.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.memory import parameters_by_stage
from mindspeed_llm.plan.plan import Plan

SMALL_HEAD, SMALL_LATENT, SMALL_WIDTH, SMALL_VOCABULARY = 4, 8, 8, 256
# Tokens of a rank for each of the ranks that share the experts.
TOKENS_FOR_EXPERTS = 32


@dataclass(frozen=True)
class RankCheck:
    """What was found.

    Attributes:
        parameters, planned: of the rank's full-size part as built, and by the plan's count.
        tensors: its parameters' number.
        seconds: all of it took.
    """

    rank: int
    parameters: int
    planned: int
    tensors: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank}: {self.parameters:,} parameters in {self.tensors} tensors, as planned; a narrow model "
            f"of this layout took one step with pretended communication ({self.seconds:.1f} s)"
        )


def check_rank(plan: Plan, rank: int) -> RankCheck:
    """Build and step one rank of a planned run, in a process of its own, without its devices or weights.

    Raises:
        UserError: there is no such rank, or its part cannot be built or stepped.
    """
    if not 0 <= rank < plan.world_size:
        raise UserError(f"--check-rank: {rank} is wrong; legal: 0..{plan.world_size - 1}")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as one:
        try:
            return one.submit(_check, plan, rank).result()
        except UserError:
            raise
        except BrokenProcessPool as died:
            raise UserError(f"--check-rank: the process of rank {rank} died ({died}); try: more memory") from died
        except Exception as error:
            told = " ".join(str(error).split())
            raise UserError(f"--check-rank: rank {rank} fails: {type(error).__name__}: {told}") from error


def _check(plan: Plan, rank: int) -> RankCheck:
    start = time.perf_counter()
    _pretend(plan, rank)
    parameters, tensors = _build_without_memory(plan)
    here = plan.layout.coordinates(rank)
    planned = parameters_by_stage(plan.shape, plan.layout, plan.padded_vocab_size)[here.pp].total
    if parameters != planned:
        raise UserError(f"rank {rank} holds {parameters:,} parameters and the plan says {planned:,}")
    _step(small_plan(plan))
    return RankCheck(rank, parameters, planned, tensors, time.perf_counter() - start)


def _pretend(plan: Plan, rank: int) -> None:
    """Be one rank of a fake process group, in a process that nothing else uses."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group = dist.new_group
    # Groups asked for with gloo would look for their peers. To be done before megatron's view of torch is made.
    dist.new_group = lambda *args, **named: new_group(*args, **{**named, "backend": None})

    from mindspeed_llm.training.setup import start_processes

    world = str(plan.world_size)
    os.environ |= {"MINDSPEED_LLM_DEVICE": "cpu", "RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": "1"}
    plan.config.runtime.device = "cpu"
    dist.init_process_group("fake", rank=rank, world_size=plan.world_size, store=FakeStore())
    start_processes(plan)


def _build_without_memory(plan: Plan) -> tuple[int, int]:
    """(parameters, tensors) of the rank's part of the model."""
    from mindspeed_llm.models.build import build_chunks
    from mindspeed_llm.models.nf4_weight import nf4_weights
    from mindspeed_llm.training.build_options import build_options

    with _on_meta():
        chunks = build_chunks(plan.shape, build_options(plan, initialize=False))
    tensors = [p for chunk in chunks for p in (*chunk.parameters(), *nf4_weights(chunk).values())]
    return sum(p.numel() for p in tensors), len(tensors)


@contextmanager
def _on_meta() -> Iterator[None]:
    """Every new tensor has a shape and no memory, whatever device it is asked for on; there is nothing to reduce."""
    import torch
    import torch.distributed as dist
    from torch.overrides import TorchFunctionMode
    from torch.utils._device import _device_constructors

    meta = torch.device("meta")

    class OnMeta(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in _device_constructors():
                return function(*args, **{**(kwargs or {}), "device": meta})
            if function is torch.Tensor.to and args[0].device == meta:
                return args[0]
            return function(*args, **(kwargs or {}))

    # Copies of tied embeddings are made equal while the model is built.
    with OnMeta(), mock.patch.object(dist, "all_reduce", lambda *args, **named: None):
        yield


def small_plan(plan: Plan) -> Plan:
    """The same layout for a narrow model, from random weights, with as few micro-batches as the schedule takes.

    Its rows are too short for NF4, so its weights are dense.
    """
    shape, layout = plan.shape, plan.layout
    config = copy.deepcopy(plan.config)
    config.training.micro_batch_size = 1
    split = layout.sequence_split
    unit = 2 * split.multiple * split.ranks * layout.tp
    tokens = layout.ep * TOKENS_FOR_EXPERTS if shape.num_moe_experts else 1
    small = small_shape(shape, layout.tp, layout.expert_tp)
    return replace(
        plan,
        config=config,
        shape=small,
        stored_shape=small,
        weights=None,
        quantized=False,
        resume=None,
        adapter_source=None,
        global_batch_size=layout.dp * (layout.pp if layout.vpp else 2),
        seq_length=-(-tokens // (shape.moe_router_topk * unit)) * unit,
        padded_vocab_size=SMALL_VOCABULARY * layout.tp,
    )


def small_shape(shape: ModelShape, tp: int, etp: int) -> ModelShape:
    """As many layers, heads, groups and experts, but narrow, and a small vocabulary."""
    head = SMALL_HEAD
    narrow = {
        "hidden_size": SMALL_WIDTH * tp,
        "ffn_hidden_size": SMALL_WIDTH * tp,
        "kv_channels": 2 * head if shape.multi_latent_attention else head,
        "vocab_size": SMALL_VOCABULARY,
    }
    if shape.num_moe_experts is not None:
        narrow["moe_ffn_hidden_size"] = SMALL_WIDTH * etp
    if shape.moe_shared_expert_intermediate_size is not None:
        narrow["moe_shared_expert_intermediate_size"] = SMALL_WIDTH * tp
    if shape.multi_latent_attention:
        narrow |= {"qk_head_dim": head, "qk_pos_emb_head_dim": head, "v_head_dim": head, "kv_lora_rank": SMALL_LATENT}
        narrow["q_lora_rank"] = None if shape.q_lora_rank is None else SMALL_LATENT
    return replace(shape, **narrow)


def _step(plan: Plan) -> None:
    """Forward, backward and optimizer step on random rows; the numbers mean nothing."""
    import torch
    from megatron.core import parallel_state

    from mindspeed_llm.data.collate import collate_padded
    from mindspeed_llm.training.run import make_optimizer
    from mindspeed_llm.training.setup import build
    from mindspeed_llm.training.step import run_batch

    model = build(plan)
    for chunk in model.chunks:
        # Stages would tell each other shapes, and a pretended message says nothing.
        chunk.config.variable_seq_lengths = False
        # Counts of tokens are this rank's own, whoever seems to send them, so each rank must have some for each other.
        chunk.config.moe_router_force_load_balancing = True
    optimizer, _ = make_optimizer(plan, model, train_iters=1)
    ids = torch.randint(0, plan.shape.vocab_size, (plan.seq_length,)).numpy()
    batch = collate_padded([{"input_ids": ids, "labels": ids}], 0, plan.seq_length)
    run_batch(model.wrapped, [batch] * plan.num_micro_batches, plan, forward_only=False)
    optimizer.step()
    parallel_state.destroy_model_parallel()
