"""The package `grouped_gemm`, which megatron's older GroupedMLP multiplies with."""

from mindspeed_llm.models.stand_ins.grouped_gemm import ops

__all__ = ["ops"]
