"""A conversation, its tokens, and what a chat template is to the rest of the program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mindspeed_llm.errors import UserError


@dataclass(frozen=True)
class Message:
    """One turn: role "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Alternating turns, the first by the user; `system` None means the template's default."""

    messages: tuple[Message, ...]
    system: str | None = None


@dataclass(frozen=True)
class Encoded:
    """Token ids [n] int32 and whether each is trained [n] bool."""

    ids: np.ndarray
    trained: np.ndarray


class ChatTemplate(Protocol):
    """What handlers, inference and chat need of a template."""

    name: str

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | UserError]:
        """Training tokens of each conversation, or why it cannot be rendered."""

    def render_prompt(self, conversation: Conversation) -> list[int]:
        """Ids up to where the assistant starts to write; the conversation ends with a user turn."""

    def stop_token_ids(self) -> list[int]:
        """Ids that end a generated answer, the one that training ends it with first."""


def require_open(conversation: Conversation) -> None:
    """Raise unless a user turn waits for an answer."""
    if not conversation.messages or conversation.messages[-1].role != "user":
        raise UserError("prompt: the last message is not the user's, so there is nothing to answer; legal: a user turn")
