"""The chat template that came with a tokenizer, with the trained tokens found in what it renders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mindspeed_llm.data.conversation import Conversation, Encoded, Message, require_open
from mindspeed_llm.data.tokenizer import Tokenizer
from mindspeed_llm.errors import UserError

HF = "hf"


class HfChatTemplate:
    """The tokenizer's own Jinja chat template; spans are found by rendering prefixes of the conversation.

    The text is tokenized as a whole, exactly as `apply_chat_template` does, and a token is trained when it lies between
    the end of a generation prompt and the end of that assistant turn (without trailing white space, which a
    generation that stopped never reaches). Where a token would lie across such a bound (an answer that starts with a
    line feed, say), prompts and answers are tokenized apart.
    """

    name = HF

    def __init__(self, tokenizer: Tokenizer, enable_thinking: str = "none") -> None:
        if tokenizer.backend is None:
            raise UserError(
                f"prompt-type: hf needs a tokenizer.json, because '{tokenizer.source}' (sentencepiece) does not read "
                "special tokens inside text; try: a named template"
            )
        if tokenizer.chat_template is None:
            raise UserError(
                f"prompt-type: hf, but '{tokenizer.source}' has no chat template; try: a named template such as llama2"
            )
        if enable_thinking != "none" and "enable_thinking" not in tokenizer.chat_template:
            raise UserError(
                f"enable-thinking: {enable_thinking!r} has no meaning for the chat template of '{tokenizer.source}', "
                "because it does not read enable_thinking; legal: none"
            )
        self.tokenizer = tokenizer
        self.options = {} if enable_thinking == "none" else {"enable_thinking": enable_thinking == "true"}

    def _render(self, conversation: Conversation, count: int, generation: bool) -> str:
        messages = [{"role": m.role, "content": m.content} for m in conversation.messages[:count]]
        if conversation.system:
            messages.insert(0, {"role": "system", "content": conversation.system})
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=generation, **self.options)

    def trained_ranges(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and the character ranges in it that are trained.

        Raises:
            UserError: an earlier part of the text changes when turns are added, so there is no boundary to find.
        """
        text = self._render(conversation, len(conversation.messages), False)
        ranges = []
        for number, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            prompt = self._render(conversation, number, True)
            answered = self._render(conversation, number + 1, False)
            if not (answered.startswith(prompt) and text.startswith(answered.rstrip())):
                raise UserError(
                    f"prompt-type: the chat template of '{self.tokenizer.source}' changes turn {number + 1} "
                    "once later turns follow, so its trained tokens cannot be told; try: a named template"
                )
            ranges.append((len(prompt), len(answered.rstrip())))
        return text, ranges

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | UserError]:
        """Training tokens of each conversation, or why it cannot be rendered."""
        results: list[Any] = []
        for conversation in conversations:
            try:
                results.append(self.trained_ranges(conversation))
            except UserError as error:
                results.append(error)
        texts = [result[0] for result in results if not isinstance(result, UserError)]
        encodings = iter(self.tokenizer.backend.encode_batch(texts, add_special_tokens=False))
        return [
            result
            if isinstance(result, UserError)
            else _by_offsets(next(encodings), result[1]) or self._by_pieces(*result)
            for result in results
        ]

    def _by_pieces(self, text: str, ranges: list[tuple[int, int]]) -> Encoded:
        """Prompts and answers tokenized apart, as in generation, where the prompt alone is tokenized."""
        bounds = [0, *(bound for pair in ranges for bound in pair), len(text)]
        pieces = self.tokenizer.encode_batch([text[a:b] for a, b in zip(bounds[:-1], bounds[1:])])
        ids = np.array([index for piece in pieces for index in piece], np.int32)
        # Pieces alternate: before an answer, the answer, between answers, the answer, ..., after the last.
        return Encoded(ids, np.repeat(np.arange(len(pieces)) % 2 == 1, [len(piece) for piece in pieces]))

    def render_prompt(self, conversation: Conversation) -> list[int]:
        """Ids up to where the assistant starts to write."""
        require_open(conversation)
        return self.tokenizer.encode(self._render(conversation, len(conversation.messages), True))

    def stop_token_ids(self) -> list[int]:
        """The token that ends an assistant turn in this template, then the tokenizer's eos."""
        probe = Conversation((Message("user", "a"), Message("assistant", "b")))
        encoded = self.encode([probe])[0]
        if isinstance(encoded, UserError):
            raise encoded
        last = int(encoded.ids[encoded.trained][-1])
        special = self.tokenizer.backend.get_added_tokens_decoder()
        ends = [last] if last in special and special[last].special else []
        return list(dict.fromkeys(i for i in [*ends, self.tokenizer.eos_token_id] if i is not None))


def _by_offsets(encoding: Any, ranges: list[tuple[int, int]]) -> Encoded | None:
    """Trained tokens by their characters; None if a token lies across a bound of a range."""
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    starts, stops = offsets[:, 0], offsets[:, 1]
    trained = np.zeros(len(offsets), bool)
    for first, last in ranges:
        if any(np.any((starts < bound) & (stops > bound)) for bound in (first, last)):
            return None
        trained |= (starts >= first) & (stops <= last) & (stops > starts)
    return Encoded(np.array(encoding.ids, np.int32), trained)
