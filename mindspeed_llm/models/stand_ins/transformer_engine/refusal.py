"""The one line that refuses what only Transformer Engine computes."""

from __future__ import annotations

from mindspeed_llm.errors import UserError


def refuse(what: str, legal: str) -> UserError:
    """The error for a feature `what`; `legal` says what can be asked for instead."""
    return UserError(
        f"transformer_engine: {what} is wrong, because Transformer Engine is not installed and this library computes "
        f"its layers in the tensors' own precision without it; legal: {legal}; try: install transformer-engine"
    )
