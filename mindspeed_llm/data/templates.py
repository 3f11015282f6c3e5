"""Chat templates: a conversation becomes token ids together with a flag per token saying whether it is trained.

Rendering follows LLaMA-Factory 0.8.2, which MindSpeed-LLM's templates rely on:

    prefix, system, user 0, assistant 0, separator, user 1, assistant 1, separator, ...

Every slot is tokenized by itself, so the ids of a prompt are by construction a strict prefix of the training ids, and
the trained tokens are exactly those of the assistant slots, whatever ids they have (pad == eos does no harm).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from mindspeed_llm.data.conversation import ChatTemplate, Conversation, Encoded, require_open
from mindspeed_llm.data.hf_template import HF, HfChatTemplate
from mindspeed_llm.data.tokenizer import Tokenizer
from mindspeed_llm.errors import UserError

SHIPPED = Path(__file__).with_name("templates.yaml")
CONTENT = "{{content}}"
THINKING = ("true", "false", "none")

Slot = str | Mapping[str, str]


@dataclass(frozen=True)
class TemplateSpec:
    """One entry of templates.yaml.

    Args:
        prefix: slots before everything else.
        system, user, assistant: slots of a turn; the assistant's default is the text and, unless `efficient_eos`, eos.
        separator: slots between an assistant turn and the next user turn.
        default_system: used when a conversation brings no system text.
        system_in_first_user_turn: the rendered system text is put inside the first user text (Llama 2).
        stop_words: tokens that end generation.
        replace_eos: the first stop word takes the place of eos.
        efficient_eos: eos only once, after the last assistant turn.
        thought_words: opening and closing of a thought; makes it a reasoning template.
    """

    prefix: tuple[Slot, ...] = ()
    system: tuple[Slot, ...] = (CONTENT,)
    user: tuple[Slot, ...] = (CONTENT,)
    assistant: tuple[Slot, ...] | None = None
    separator: tuple[Slot, ...] = ()
    default_system: str = ""
    system_in_first_user_turn: bool = False
    stop_words: tuple[str, ...] = ()
    replace_eos: bool = False
    efficient_eos: bool = False
    thought_words: tuple[str, str] | None = None

    @property
    def assistant_slots(self) -> tuple[Slot, ...]:
        """Slots of an answer: the template's own, else the content and, unless it ends the turn, eos."""
        if self.assistant is not None:
            return self.assistant
        return (CONTENT,) if self.efficient_eos else (CONTENT, {"special": "eos_token"})


@cache
def read_templates(path: str | Path = SHIPPED) -> dict[str, TemplateSpec]:
    """All templates of a YAML file.

    Raises:
        UserError: the file is missing, or an entry has an unknown field or slot.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"prompt-type-path: '{path}' does not exist; legal: a YAML file laid out like {SHIPPED}")
    entries = _read_entries(path)
    legal = {f.name for f in dataclasses.fields(TemplateSpec)}
    specs = {}
    for name, entry in entries.items():
        if unknown := sorted(set(entry) - legal):
            raise UserError(f"template: {name!r} in '{path}' has unknown fields {unknown}; legal: {sorted(legal)}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
        specs[name] = spec = TemplateSpec(**values)
        for slot in (*spec.prefix, *spec.system, *spec.user, *spec.assistant_slots, *spec.separator):
            _check_slot(name, slot)
        if spec.system_in_first_user_turn and not all(isinstance(slot, str) for slot in spec.system):
            raise UserError(f"template: {name!r} in '{path}' puts system into the user text, so its slots are strings")
        if spec.replace_eos and not spec.stop_words:
            raise UserError(f"template: {name!r} in '{path}' replaces eos but has no stop_words")
    return specs


def _read_entries(path: Path) -> dict[str, dict[str, Any]]:
    """What a template file holds: for each name an object of fields. YAML reads JSON too."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"prompt-type-path: '{path}' cannot be read, because {reason}; legal: a YAML file") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise UserError(
            f"prompt-type-path: '{path}' is no table of templates by name; legal: a YAML file laid out like {SHIPPED}"
        )
    return entries


def _check_slot(name: str, slot: Slot) -> None:
    if isinstance(slot, str) or set(slot) == {"token"} or slot in ({"special": "bos_token"}, {"special": "eos_token"}):
        return
    raise UserError(
        f"template: slot {slot!r} of {name!r} is unknown; legal: a string, {{special: bos_token}}, "
        "{special: eos_token} or {token: '...'}"
    )


def load_template(
    prompt_type: str, tokenizer: Tokenizer, path: str | Path | None = None, enable_thinking: str = "none"
) -> ChatTemplate:
    """The template `prompt_type` bound to a tokenizer.

    Args:
        prompt_type: a name in the template file, or "hf" for the tokenizer's own chat template.
        path: template file, default the shipped one.
        enable_thinking: "true" trains an empty thought where a turn has none, "false" strips thoughts and puts the
            empty thought on the prompt's side, "none" does so only where a turn has none and keeps the others.

    Raises:
        UserError: unknown name, a token the template needs is not in the vocabulary, or thinking is asked of a
            template without thoughts.
    """
    if enable_thinking not in THINKING:
        raise UserError(f"enable-thinking: {enable_thinking!r} is unknown; legal: {', '.join(THINKING)}")
    if prompt_type == HF:
        if path is not None:
            raise UserError("prompt-type-path: has no use with --prompt-type hf, which takes the tokenizer's template")
        return HfChatTemplate(tokenizer, enable_thinking)
    return SlotTemplate(prompt_type, named_template(prompt_type, path), tokenizer, enable_thinking)


def named_template(name: str, path: str | Path | None = None) -> TemplateSpec:
    """The entry `name` of a template file, by default the shipped one.

    Raises:
        UserError: there is none of that name.
    """
    specs = read_templates(SHIPPED if path is None else path)
    if name not in specs:
        near = difflib.get_close_matches(name, [*specs, HF], 1)
        hint = f"; try: {near[0]}" if near else ""
        raise UserError(f"prompt-type: {name!r} is unknown; legal: {', '.join(sorted([*specs, HF]))}{hint}")
    return specs[name]


class Span(NamedTuple):
    """A text to tokenize, or (text None) one token given by its id."""

    text: str | None
    token_id: int
    trained: bool


class SlotTemplate:
    """A template of templates.yaml bound to a tokenizer."""

    def __init__(self, name: str, spec: TemplateSpec, tokenizer: Tokenizer, enable_thinking: str = "none") -> None:
        self.name = name
        self.spec = spec
        self.tokenizer = tokenizer
        self.enable_thinking = enable_thinking
        if enable_thinking != "none" and spec.thought_words is None:
            raise UserError(
                f"enable-thinking: {enable_thinking!r} has no meaning for template {name!r}, which has no thoughts; "
                "legal: none; try: --prompt-type qwen3"
            )
        self._eos = self._eos_id()
        self._prefix = self._resolve(spec.prefix)
        self._system = self._resolve(spec.system)
        self._user = self._resolve(spec.user)
        self._assistant = self._resolve(spec.assistant_slots)
        self._separator = self._resolve(spec.separator)
        self._end = self._resolve(({"special": "eos_token"},) if spec.efficient_eos else ())

    def _eos_id(self) -> int | None:
        if not self.spec.replace_eos:
            return self.tokenizer.eos_token_id
        return self._token_id(self.spec.stop_words[0])

    def _token_id(self, token: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(token)
        if index is None:
            raise UserError(
                f"prompt-type: template {self.name!r} needs the token {token!r}, which '{self.tokenizer.source}' does "
                "not have; try: a template made for this tokenizer, or --prompt-type hf"
            )
        return index

    def _resolve(self, slots: Sequence[Slot]) -> tuple[str | int, ...]:
        """Slots with tokens replaced by their ids."""
        return tuple(slot if isinstance(slot, str) else self._slot_id(slot) for slot in slots)

    def _slot_id(self, slot: Mapping[str, str]) -> int:
        if "token" in slot:
            return self._token_id(slot["token"])
        name = slot["special"]
        index = self._eos if name == "eos_token" else self.tokenizer.bos_token_id
        if index is None:
            raise UserError(
                f"prompt-type: template {self.name!r} needs {name}, which '{self.tokenizer.source}' does not have; "
                "try: a template made for this tokenizer, or --prompt-type hf"
            )
        return index

    def spans(self, conversation: Conversation, generation: bool = False) -> list[Span]:
        """The pieces of a conversation, in order.

        Args:
            conversation: alternating turns; for `generation` the last one is the user's.
        """
        system = conversation.system or self.spec.default_system
        spans: list[Span] = []
        _fill(spans, self._prefix, "", False)
        folded = ""
        if system and self.spec.system_in_first_user_turn:
            folded = "".join(slot.replace(CONTENT, system) for slot in self.spec.system)
        elif system:
            _fill(spans, self._system, system, False)
        for number, message in enumerate(conversation.messages):
            if message.role == "user":
                if number:
                    _fill(spans, self._separator, "", False)
                _fill(spans, self._user, message.content if number else folded + message.content, False)
            else:
                self._fill_answer(spans, message.content)
        if not generation:
            _fill(spans, self._end, "", True)
        elif self.spec.thought_words and self.enable_thinking == "false":
            spans.append(Span("".join(self.spec.thought_words), 0, False))
        return spans

    def _fill_answer(self, spans: list[Span], content: str) -> None:
        if self.spec.thought_words:
            opening, closing = self.spec.thought_words
            if self.enable_thinking == "false":
                content = _remove_thoughts(content, opening, closing)
            if opening not in content and closing not in content:
                # An empty thought is trained only when thoughts were asked for.
                spans.append(Span(opening + closing, 0, self.enable_thinking == "true"))
        _fill(spans, self._assistant, content, True)

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | UserError]:
        """Training tokens of each conversation; all texts go to the tokenizer in one batch."""
        spans_of = [self.spans(conversation) for conversation in conversations]
        spans = list(chain.from_iterable(spans_of))
        pieces = self._encode_spans(spans)
        # One array for all conversations, cut at the end: numpy calls per row would cost as much as tokenizing.
        sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
        ids = np.fromiter(chain.from_iterable(pieces), np.int32, int(sizes.sum()))
        trained = np.repeat(np.fromiter((span.trained for span in spans), bool, len(spans)), sizes)
        piece_ends = np.concatenate([[0], np.cumsum(sizes)])
        bounds = piece_ends[np.cumsum([0, *map(len, spans_of)])].tolist()
        return [Encoded(ids[start:stop], trained[start:stop]) for start, stop in zip(bounds[:-1], bounds[1:])]

    def _encode_spans(self, spans: list[Span]) -> list[Sequence[int]]:
        encoded = iter(self.tokenizer.encode_batch([span.text for span in spans if span.text is not None]))
        return [(span.token_id,) if span.text is None else next(encoded) for span in spans]

    def render_prompt(self, conversation: Conversation) -> list[int]:
        """Ids up to where the assistant starts to write."""
        require_open(conversation)
        return list(chain.from_iterable(self._encode_spans(self.spans(conversation, generation=True))))

    def stop_token_ids(self) -> list[int]:
        """The end token that is trained first, then the tokenizer's eos and the other stop words it knows."""
        known = [self.tokenizer.convert_tokens_to_ids(word) for word in self.spec.stop_words]
        candidates = [self._eos, self.tokenizer.eos_token_id, *known]
        return list(dict.fromkeys(index for index in candidates if index is not None))


def _remove_thoughts(content: str, opening: str, closing: str) -> str:
    while (start := content.find(opening)) >= 0 and (stop := content.find(closing, start)) >= 0:
        content = content[:start] + content[stop + len(closing) :]
    return content.lstrip("\n")


def _fill(spans: list[Span], slots: tuple[str | int, ...], content: str, trained: bool) -> None:
    """Append the slots with their content, leaving out empty texts."""
    for slot in slots:
        if isinstance(slot, int):
            spans.append(Span(None, slot, trained))
        elif text := slot.replace(CONTENT, content):
            spans.append(Span(text, 0, trained))
