"""A model with its tokenizer and template: text in, text out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindspeed_llm.data.conversation import ChatTemplate, Conversation, Message
from mindspeed_llm.data.tokenizer import Tokenizer
from mindspeed_llm.errors import UserError
from mindspeed_llm.inference.beam import beam_search
from mindspeed_llm.inference.detokenize import Detokenizer, StopStrings
from mindspeed_llm.inference.engine import Answer, check_model, decode_steps, new_answers
from mindspeed_llm.inference.settings import GenerationSettings

Streamer = Callable[[int, str], None]


@dataclass
class LoadedModel:
    """What `generate` answers with.

    Attributes:
        model: a whole LanguageModel in eval mode.
        template: renders prompts as user turns; None takes them as raw text.
        stop_token_ids: tokens that end any answer of this model (its own and the template's).
        adapters: a lora.combine.AdapterShelf where several sets of adapters, or weights for them, were given.
    """

    model: Any
    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    stop_token_ids: tuple[int, ...] = ()
    adapters: Any = None

    def encode(self, prompt: str | Conversation, system: str | None = None) -> list[int]:
        """Tokens of a prompt: a conversation or, with a template, a user's single turn; otherwise raw text.

        Raises:
            UserError: a conversation or a system text without a template.
        """
        if self.template is None:
            if not isinstance(prompt, str) or system is not None:
                raise UserError("system: raw prompts have no system text; try: --prompt-type with a chat template")
            return leading_tokens(self.tokenizer) + self.tokenizer.encode(prompt)
        if isinstance(prompt, str):
            prompt = Conversation((Message("user", prompt),), system)
        return self.template.render_prompt(prompt)

    def stream(
        self, prompts: Sequence[list[int]], settings: GenerationSettings, batch_size: int = 1, first: int = 0
    ) -> Iterator[tuple[int, str]]:
        """Pieces of the answers as they grow.

        Args:
            prompts: token ids.
            settings: `stop_token_ids` are added to the model's own.
            batch_size: prompts answered together; the answers do not depend on it.
            first: number of the first of these prompts among all that are asked; it takes part in drawing.

        Yields:
            (number of the prompt, text): no piece is empty or splits a character; beam search gives an answer whole.

        Raises:
            UserError: see `engine.new_answers` and `engine.check_model`.
        """
        check_model(self.model)
        settings = replace(settings, stop_token_ids=(*self.stop_token_ids, *settings.stop_token_ids))
        answers = new_answers(self.model.config.shape, prompts, settings)
        texts = [AnswerText(self.tokenizer, a, self.template is None, settings.stop_strings) for a in answers]
        if settings.num_beams > 1:
            for number, (answer, text) in enumerate(zip(answers, texts)):
                beam_search(self.model, answer, settings, text.stops_at, first + number)
                yield from ((number, piece) for piece in text.pieces() if piece)
            return
        for start in range(0, len(answers), batch_size):
            batch = answers[start : start + batch_size]
            for active in decode_steps(self.model, batch, settings, first + start):
                for number in active:
                    yield from ((number - first, piece) for piece in texts[number - first].pieces() if piece)

    def answer(
        self,
        prompts: Sequence[list[int]],
        settings: GenerationSettings,
        batch_size: int = 1,
        streamer: Streamer | None = None,
        first: int = 0,
    ) -> list[str]:
        """The answers as texts; `streamer(number of the prompt, piece)` is told each piece."""
        collected: list[list[str]] = [[] for _ in prompts]
        for number, piece in self.stream(prompts, settings, batch_size, first):
            collected[number].append(piece)
            if streamer is not None:
                streamer(number, piece)
        return ["".join(pieces) for pieces in collected]


class AnswerText:
    """The text of an answer while its tokens come; ends the answer when a stop string appears."""

    def __init__(self, tokenizer: Tokenizer, answer: Answer, raw: bool, stop_strings: Sequence[str]):
        self.tokenizer, self.answer = tokenizer, answer
        # An answer to raw text goes on with it (a space may belong in between); after a template it stands by itself.
        self.context = answer.prompt[-8:] if raw else []
        self.strings = stop_strings
        self.detokenizer, self.stops = Detokenizer(tokenizer, self.context), StopStrings(stop_strings)
        self.done = 0

    def pieces(self) -> Iterator[str]:
        """Text that has become certain since the last call."""
        answer = self.answer
        while self.done < len(answer.tokens):
            yield self.stops.pass_on(self.detokenizer.add(answer.tokens[self.done]))
            self.done += 1
            if self.stops.found:
                answer.finish = "string"
                return
        if answer.finish is not None:
            yield self.stops.pass_on(self.detokenizer.finish())
            yield self.stops.rest()

    def stops_at(self, tokens: Sequence[int]) -> bool:
        """Whether an answer of these tokens contains a stop string."""
        if not self.strings:
            return False
        front = self.tokenizer.decode(self.context, skip_special_tokens=True)
        text = self.tokenizer.decode([*self.context, *tokens], skip_special_tokens=True)[len(front) :]
        return any(s in text for s in self.strings)


def leading_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer itself puts in front of a text (bos, for most Llamas), as transformers' call does."""
    if tokenizer.backend is None:
        return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoding = tokenizer.backend.encode("a", add_special_tokens=True)
    count = next((n for n, special in enumerate(encoding.special_tokens_mask) if not special), 0)
    return encoding.ids[:count]


def recorded_stop_tokens(tokenizer: Tokenizer, directory: Path | None) -> tuple[int, ...]:
    """End tokens of a model: the tokenizer's eos and those in generation_config.json and config.json."""
    found: list[int | None] = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        file = directory / name if directory is not None else None
        if file is not None and file.is_file():
            ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids]
    return tuple(dict.fromkeys(i for i in found if i is not None))
