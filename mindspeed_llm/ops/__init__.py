"""Operators: one file each with signature, maths and plain reference; the registry chooses among implementations."""

from __future__ import annotations

import importlib

OPERATORS = (
    "activation",
    "adamw",
    "adapter",
    "attention",
    "attention_blocks",
    "attention_masked",
    "attention_packed",
    "attention_part",
    "attention_rows",
    "cross_entropy",
    "grouped_matmul",
    "matmul_accumulate",
    "moe_gating",
    "moe_permute",
    "nf4",
    "norm",
    "parallel_matmul",
    "rotary",
    "softmax",
    "swiglu",
    "compiled.activation",
    "compiled.nf4",
    "compiled.norm",
    "compiled.rotary",
    "cuda.adapter",
    "cuda.attention",
    "cuda.liger",
    "npu.attention",
    "npu.attention_part",
    "npu.grouped_matmul",
    "npu.moe_gating",
    "npu.moe_permute",
    "npu.norm",
    "npu.parallel_matmul",
    "npu.rotary",
    "npu.swiglu",
)


def load_all() -> None:
    """Import every operator and its implementations, so that the registry knows all implementations."""
    for name in OPERATORS:
        importlib.import_module(f"mindspeed_llm.ops.{name}")
