"""Whether this machine's CPU multiplies bf16 by oneDNN, whose layouts `--lora-prepack` brings frozen weights into."""

from __future__ import annotations


def why_not() -> str | None:
    """Why weights cannot be laid out for such products here; None when they can."""
    import torch

    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return "oneDNN multiplies no bf16 on this processor, or torch was built without it"
