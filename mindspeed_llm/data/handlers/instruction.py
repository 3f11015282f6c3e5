"""Conversations for supervised fine-tuning: Alpaca and ShareGPT rows, rendered by a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from mindspeed_llm.data.conversation import ChatTemplate, Conversation, Encoded, Message
from mindspeed_llm.data.handlers.base import ChunkResult, Handler, concatenate
from mindspeed_llm.data.record import IGNORE_INDEX, SFT_STREAMS, sft_stream
from mindspeed_llm.data.sources import Chunk
from mindspeed_llm.data.tokenizer import Tokenizer
from mindspeed_llm.errors import UserError

ROLE_SYNONYMS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "observation": "observation",
    "tool": "observation",
    "function_call": "function",
    "function": "function",
}
# Keys of a single message that change what is trained; ignoring them would train something else than was asked.
UNSUPPORTED_MESSAGE_KEYS = ("tool_calls", "function_call", "loss", "weight", "train")


class InstructionHandler(Handler):
    """Base: rows -> `Conversation` -> input_ids and labels of equal length, labels -100 where nothing is trained.

    Args:
        template: chat template bound to the tokenizer.
        map_keys: our name of a column -> its name in the data.
        seq_length: longest sample in tokens; None for no limit.
        cut: cut longer samples to `seq_length` instead of dropping them.
        append_eod: end each sample with a trained eos where the template does not end it so.
    """

    stage: ClassVar[str] = "sft"
    COLUMNS: ClassVar[Mapping[str, str]]
    TAGS: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        map_keys: Mapping[str, Any] | None = None,
        seq_length: int | None = None,
        cut: bool = False,
        append_eod: bool = False,
    ) -> None:
        super().__init__(tokenizer)
        if append_eod and tokenizer.eos_token_id is None:
            raise UserError(f"append-eod: set, but '{tokenizer.source}' has no eos token; try: no --append-eod")
        self.template = template
        self.seq_length = seq_length
        self.cut = cut
        self.append_eod = append_eod
        self.columns, self.tags = dict(self.COLUMNS), dict(self.TAGS)
        self._apply_map(map_keys or {})

    def _apply_map(self, map_keys: Mapping[str, Any]) -> None:
        flat = _flat(map_keys)
        for key, value in flat.items():
            table = self.columns if key in self.COLUMNS else self.tags if key in self.TAGS else None
            if table is None or not isinstance(value, str):
                raise UserError(
                    f"map-keys: {key!r}: {value!r} is not a mapping of {type(self).__name__}; legal keys: "
                    f"{', '.join([*self.COLUMNS, *self.TAGS])}, values are column or tag names"
                )
            table[key] = value
        self._mapped = {flat[key] for key in flat if key in self.COLUMNS}

    @property
    def mapped_columns(self) -> set[str]:
        return self._mapped

    @property
    def stream_dtypes(self) -> dict[str, np.dtype]:
        # int32 always: -100 must survive, which uint16 turns into 65436.
        return {sft_stream(name): np.dtype(np.int32) for name in SFT_STREAMS}

    def conversation(self, row: dict[str, Any]) -> Conversation:
        """The conversation a row holds.

        Raises:
            UserError: the row cannot be understood; the message is the reason alone.
        """
        raise NotImplementedError

    def process(self, chunk: Chunk) -> ChunkResult:
        """Tokenize a chunk into the streams `input_ids` and `labels`."""
        result = ChunkResult(num_rows=len(chunk.rows), num_bytes=chunk.num_bytes)
        origins, conversations = [], []
        for number, row in chunk.decode():
            try:
                if isinstance(row, UserError):
                    raise row
                result.columns.update(row)
                conversations.append(self.conversation(row))
                origins.append(chunk.origin(number))
            except UserError as error:
                result.bad.append((chunk.origin(number), str(error)))
        all_ids, all_labels = [], []
        for origin, encoded in zip(origins, self.template.encode(conversations)):
            if isinstance(encoded, UserError):
                result.bad.append((origin, str(encoded)))
            elif (sample := self._sample(encoded, result)) is not None:
                all_ids.append(sample[0])
                all_labels.append(sample[1])
        result.streams = {"input_ids": concatenate(all_ids, np.int32), "labels": concatenate(all_labels, np.int32)}
        return result

    def _sample(self, encoded: Encoded, result: ChunkResult) -> tuple[np.ndarray, np.ndarray] | None:
        ids, trained = encoded.ids, encoded.trained
        if self.append_eod and (not len(ids) or ids[-1] != self.tokenizer.eos_token_id):
            ids, trained = np.append(ids, np.int32(self.tokenizer.eos_token_id)), np.append(trained, True)
        if self.seq_length is not None and len(ids) > self.seq_length:
            if not self.cut:
                result.dropped[f"longer than seq-length {self.seq_length}"] += 1
                return None
            result.dropped[f"cut to seq-length {self.seq_length} (kept)"] += 1
            ids, trained = ids[: self.seq_length], trained[: self.seq_length]
        # The first token has no predecessor that could predict it, so it counts as untrained.
        num_trained = int(np.count_nonzero(trained[1:]))
        if num_trained == 0:
            result.dropped["no trained token"] += 1
            return None
        result.num_trained += num_trained
        return ids, np.where(trained, ids, np.int32(IGNORE_INDEX))


class AlpacaStyleInstructionHandler(InstructionHandler):
    """Rows with instruction, input, output, and optionally system and history (a list of [question, answer])."""

    COLUMNS = {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "system",
        "history": "history",
        "tools": "tools",
    }

    def conversation(self, row: dict[str, Any]) -> Conversation:
        """See the base class."""
        _refuse_tools(row, self.columns["tools"])
        texts = {key: _text(row, self.columns[key], required=key in ("prompt", "response")) for key in _ALPACA_TEXTS}
        messages = []
        for turn in self._history(row):
            messages += [Message("user", turn[0]), Message("assistant", turn[1])]
        user = "\n".join(text for text in (texts["prompt"], texts["query"]) if text)
        if not user or not texts["response"]:
            raise UserError(f"empty {'instruction' if not user else 'output'}")
        messages += [Message("user", user), Message("assistant", texts["response"])]
        return Conversation(tuple(messages), texts["system"] or None)

    def _history(self, row: dict[str, Any]) -> list[Any]:
        history = row.get(self.columns["history"]) or []
        well_formed = isinstance(history, list) and all(
            isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(text, str) and text for text in turn)
            for turn in history
        )
        if not well_formed:
            raise UserError(
                f"column {self.columns['history']!r} is not a list of [question, answer] with texts in both"
            )
        return history

    @classmethod
    def fits(cls, row: dict[str, Any], map_keys: Mapping[str, Any], json_keys: Sequence[str]) -> bool:
        """See the base class."""
        names = {**cls.COLUMNS, **map_keys}
        return set(map_keys) <= set(cls.COLUMNS) and names["prompt"] in row and names["response"] in row


_ALPACA_TEXTS = ("prompt", "query", "response", "system")


class SharegptStyleInstructionHandler(InstructionHandler):
    """Rows with a list of messages; roles are read from each message, and user and assistant must alternate."""

    COLUMNS = {"messages": "conversations", "system": "system", "tools": "tools"}
    TAGS = {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "system_tag": "system",
        "observation_tag": "observation",
        "function_tag": "function_call",
    }

    def _apply_map(self, map_keys: Mapping[str, Any]) -> None:
        super()._apply_map(map_keys)
        roles = ("user", "assistant", "system", "observation", "function")
        # A tag the user gives wins over the synonyms, also when it is another role's usual name.
        self._roles = {**ROLE_SYNONYMS, **{self.tags[f"{role}_tag"]: role for role in roles}}

    def conversation(self, row: dict[str, Any]) -> Conversation:
        """See the base class."""
        _refuse_tools(row, self.columns["tools"])
        column = self.columns["messages"]
        raw = row.get(column)
        if not isinstance(raw, list) or not raw:
            raise UserError(
                f"column {column!r} is not a list of messages (it has {', '.join(map(repr, row)) or 'no columns'}; "
                "map-keys can name another column)"
            )
        turns = [self._turn(number, message) for number, message in enumerate(raw, 1)]
        system = _text(row, self.columns["system"], required=False)
        if turns[0].role == "system":
            if system and system != turns[0].content:
                raise UserError("a system text in its column and another one in the first message")
            system = turns.pop(0).content
        _check_alternation(turns)
        return Conversation(tuple(turns), system or None)

    def _turn(self, number: int, message: Any) -> Message:
        role_tag, content_tag = self.tags["role_tag"], self.tags["content_tag"]
        if not isinstance(message, dict) or role_tag not in message or content_tag not in message:
            keys = ", ".join(map(repr, message)) if isinstance(message, dict) else type(message).__name__
            raise UserError(
                f"message {number} lacks {role_tag!r} or {content_tag!r} (it has {keys}; see map-keys tags)"
            )
        if used := [key for key in UNSUPPORTED_MESSAGE_KEYS if message.get(key) not in (None, [], {})]:
            raise UserError(f"message {number} has {used[0]!r}, which is not supported")
        role = self._roles.get(message[role_tag])
        if role is None:
            raise UserError(f"message {number} has the unknown role {message[role_tag]!r}")
        if role in ("observation", "function"):
            raise UserError(f"message {number} has role {message[role_tag]!r}: tool calls are not supported")
        content = message[content_tag]
        if not isinstance(content, str) or (not content and role != "system"):
            raise UserError(f"message {number} ({message[role_tag]}) has no text")
        return Message(role, content)

    @classmethod
    def fits(cls, row: dict[str, Any], map_keys: Mapping[str, Any], json_keys: Sequence[str]) -> bool:
        """See the base class."""
        flat = _flat(map_keys)
        names = {**cls.COLUMNS, **cls.TAGS, **flat}
        messages = row.get(names["messages"])
        is_list = isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict)
        return set(flat) <= set(cls.COLUMNS) | set(cls.TAGS) and is_list and names["role_tag"] in messages[0]


class OpenAIInstructionHandler(SharegptStyleInstructionHandler):
    """ShareGPT rows with OpenAI's names: `messages` of `role` and `content`."""

    COLUMNS = {**SharegptStyleInstructionHandler.COLUMNS, "messages": "messages"}
    TAGS = {
        **SharegptStyleInstructionHandler.TAGS,
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
    }


def _flat(map_keys: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping of columns and of message tags as one."""
    return {**{key: value for key, value in map_keys.items() if key != "tags"}, **(map_keys.get("tags") or {})}


def _text(row: dict[str, Any], column: str, required: bool) -> str:
    value = row.get(column)
    if value is None:
        if required:
            raise UserError(f"no column {column!r} (it has {', '.join(map(repr, row)) or 'none'})")
        return ""
    if not isinstance(value, str):
        raise UserError(f"column {column!r} is {type(value).__name__}, not text")
    return value


def _refuse_tools(row: dict[str, Any], column: str) -> None:
    if row.get(column) not in (None, "", "[]", []):
        raise UserError(f"column {column!r} is not empty: tools are not supported")


def _check_alternation(turns: list[Message]) -> None:
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            raise UserError(f"turn {number + 1} is the {turn.role}'s, but user and assistant must alternate")
    if not turns or turns[-1].role != "assistant":
        raise UserError("the conversation does not end with an answer of the assistant")
