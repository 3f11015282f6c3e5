"""Divisibility and combination rules of a layout and a batch, each with the values that would be legal."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class Rule:
    """One condition on the plan.

    Attributes:
        says: the condition with its numbers, e.g. "num_query_groups 4 % tensor parallel 8".
        legal: values that satisfy it.
    """

    area: str
    says: str
    ok: bool
    legal: str

    def problem(self) -> str:
        """The rule as an error line."""
        return f"{self.area}: {self.says} does not hold; legal: {self.legal}"


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def layout_rules(shape: ModelShape, layout: ParallelLayout) -> list[Rule]:
    """Conditions on a layout for a model; that the layers divide is the layer map's."""
    tp = layout.tp
    legal_tp = [d for d in divisors(shape.num_query_groups) if shape.ffn_hidden_size % d == 0]
    tp_text = ", ".join(map(str, legal_tp)) + " for --tensor-model-parallel-size"
    rules = [
        Rule("parallel", f"{name} {value} % tensor parallel {tp} = 0", value % tp == 0, tp_text)
        for name, value in (
            ("num_attention_heads", shape.num_attention_heads),
            ("num_query_groups", shape.num_query_groups),
            ("ffn_hidden_size", shape.ffn_hidden_size),
        )
    ]
    size = tp * layout.pp * layout.cp
    rules.append(
        Rule(
            "launch",
            f"world size {layout.world_size} % (tensor parallel {tp} x pipeline parallel {layout.pp} x context "
            f"parallel {layout.cp}) = 0",
            layout.world_size % size == 0,
            f"{size}, {2 * size}, {3 * size}, ... processes (torchrun --nproc-per-node x --nnodes)",
        )
    )
    return rules


def batch_rules(micro: int, global_batch: int, data_parallel: int) -> list[Rule]:
    """The batch equation: global = micro x data parallel x k."""
    unit = micro * data_parallel
    below = max(global_batch // unit, 1) * unit
    legal = ", ".join(str(v) for v in dict.fromkeys((below, below + unit)))
    return [
        Rule(
            "batch",
            f"global batch {global_batch} = micro batch {micro} x data parallel {data_parallel} x k",
            global_batch % unit == 0,
            f"nearest for --global-batch-size: {legal}",
        )
    ]


def sequence_rules(shape: ModelShape, *, seq_length: int, tp: int, sequence_parallel: bool, padded: bool) -> list[Rule]:
    """Conditions on the sample length."""
    rules = [
        Rule(
            "sequence",
            f"seq_length {seq_length} <= max_position_embeddings {shape.max_position_embeddings}",
            seq_length <= shape.max_position_embeddings,
            f"--seq-length up to {shape.max_position_embeddings}, or a stretched rope in config.json",
        )
    ]
    if sequence_parallel and padded:
        lower = seq_length // tp * tp
        rules.append(
            Rule(
                "sequence",
                f"seq_length {seq_length} % tensor parallel {tp} = 0 (sequence parallel)",
                seq_length % tp == 0,
                f"{lower}, {lower + tp} for --seq-length",
            )
        )
    return rules
