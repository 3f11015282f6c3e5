"""Patches of megatron.core.transformer.torch_norm, the norms of megatron's local specifications."""

from __future__ import annotations

from typing import Any

from torch import nn

from mindspeed_llm.patching import Patch


class TorchNorm:
    """Makes the LayerNorm or RMSNorm that the configuration names, sequence parallelism included.

    The signature is WrappedTorchNorm's, whose last three arguments it ignores too; so is persist_layer_norm, which
    chooses among Apex's kernels.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, *_ignored: Any, **_also: Any) -> nn.Module:
        from mindspeed_llm.models.norm import LayerNorm, RMSNorm

        kinds = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
        if config.normalization not in kinds:
            raise ValueError(f"normalization {config.normalization} has no torch implementation; legal: {list(kinds)}")
        if config.memory_efficient_layer_norm:
            raise ValueError("memory_efficient_layer_norm is not implemented by the torch norms; set it to False")
        return kinds[config.normalization](config, hidden_size, eps)


PATCHES = (
    Patch(
        name="torch-norm-sequence-parallel",
        target="megatron.core.transformer.torch_norm:WrappedTorchNorm",
        why="megatron's torch norms refuse sequence parallelism, and compose RMSNorm from slow parts on a CPU",
        replace=TorchNorm,
        fingerprints={"0.15.3": "c79ddefa29ba", "0.16.1": "c79ddefa29ba"},
    ),
)
