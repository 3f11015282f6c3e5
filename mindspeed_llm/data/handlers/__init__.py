"""Handlers turn rows of raw data into token sequences; they are chosen by class name (`--handler-name`)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from mindspeed_llm.data.handlers.base import ChunkResult, Handler
from mindspeed_llm.data.handlers.instruction import (
    AlpacaStyleInstructionHandler,
    OpenAIInstructionHandler,
    SharegptStyleInstructionHandler,
)
from mindspeed_llm.data.handlers.pretrain import GeneralPretrainHandler
from mindspeed_llm.errors import UserError

__all__ = ["HANDLERS", "ChunkResult", "Handler", "handler_class", "suggest_handler"]

HANDLERS: dict[str, type[Handler]] = {
    cls.__name__: cls
    for cls in (
        GeneralPretrainHandler,
        AlpacaStyleInstructionHandler,
        SharegptStyleInstructionHandler,
        OpenAIInstructionHandler,
    )
}


def handler_class(name: str | None) -> type[Handler]:
    """The handler called `name`.

    Raises:
        UserError: there is none, with the nearest name and the list.
    """
    if name in HANDLERS:
        return HANDLERS[name]
    near = difflib.get_close_matches(str(name), HANDLERS, 1, cutoff=0.4)
    hint = f"; try: {near[0]}" if near else ""
    what = "is not given" if not name else f"{name!r} is unknown"
    raise UserError(f"handler-name: {what}; legal: {', '.join(HANDLERS)}{hint}")


def suggest_handler(
    row: dict[str, Any],
    stage: str | None = None,
    map_keys: Mapping[str, Any] | None = None,
    json_keys: Sequence[str] = ("text",),
) -> str | None:
    """The handler whose columns a row has, None if none or if the row could be meant either way.

    Args:
        stage: "pretrain" or "sft": look only at handlers for it; None looks at all.
        map_keys, json_keys: columns that the user has named.
    """
    candidates = {name: cls for name, cls in HANDLERS.items() if stage in (None, cls.stage)}
    fitting = [name for name, cls in candidates.items() if cls.fits(row, map_keys or {}, json_keys)]
    return fitting[0] if len(fitting) == 1 else None
