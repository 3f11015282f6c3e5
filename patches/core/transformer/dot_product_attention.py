"""Patches of megatron.core.transformer.dot_product_attention, the attention of megatron's local specifications."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mindspeed_llm.patching import Patch


def _is_plain_causal(module: Any, mask: Tensor | None, mask_type: Any, bias: Tensor | None) -> bool:
    """Whether softmax(causal(q k^T * scale)) v is all that the module would compute."""
    from megatron.core.transformer.enums import AttnMaskType

    return (
        mask is None
        and bias is None
        and (mask_type or module.attn_mask_type) in (AttnMaskType.causal, AttnMaskType.padding_causal)
        and module.config.window_size is None
    )


def _scale(module: Any) -> float:
    """What multiplies the scores in the end: with query-key layer scaling the division by the layer is undone again."""
    return module.softmax_scale * (module.layer_number if module.config.apply_query_key_layer_scaling else 1)


def _fused_when_causal(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        from megatron.core import tensor_parallel

        from mindspeed_llm.ops.attention import attention

        if not _is_plain_causal(self, attention_mask, attn_mask_type, attention_bias):
            return original(self, query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        cu_seqlens, layout = None, "SBND"
        if packed_seq_params is not None:
            # Under causal order no token sees the padding that follows its document.
            padded = packed_seq_params.cu_seqlens_q_padded
            cu_seqlens, layout = packed_seq_params.cu_seqlens_q if padded is None else padded, "TND"
        dropout = self.attention_dropout.p if self.training else 0.0
        # Under sequence parallelism megatron's TransformerBlock has forked the stream already.
        fork = dropout and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if fork else contextlib.nullcontext():
            out = attention(
                query,
                key,
                value,
                cu_seqlens=cu_seqlens,
                dropout=dropout,
                scale=_scale(self),
                sinks=self.softmax_offset,
                layout=layout,
            )
        return out.unsqueeze(1) if layout == "TND" else out

    return forward


PATCHES = (
    Patch(
        name="dot-product-attention-packed",
        target="megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
        why="megatron's own attention refuses packed documents and builds all scores; torch's fused one does neither",
        wrap=_fused_when_causal,
        fingerprints={"0.15.3": "2cf65c035fcd", "0.16.1": "a0bbd121e290"},
    ),
)
