"""Tokens to text piece by piece, never splitting a character."""

from __future__ import annotations

from collections.abc import Sequence

from mindspeed_llm.data.tokenizer import Tokenizer

# What decoders put for bytes that are no whole character (yet).
INCOMPLETE = "\ufffd"


class Detokenizer:
    """Text of a growing answer.

    A token's text may depend on the token before it (the space in front of a word), so each piece is the difference
    of two decoded windows that begin at an earlier piece. Special tokens have no text.

    Args:
        context: tokens in front of the answer whose end its first piece joins; () for an answer by itself.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        self._ids = list(context)
        self._window, self._read = 0, len(self._ids)
        self._shown = self._decode(self._ids)

    def add(self, token: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        self._ids.append(token)
        text = self._decode(self._ids[self._window :])
        if text.endswith(INCOMPLETE):
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """What is left: bytes that never became a character."""
        return self._emit(self._decode(self._ids[self._window :]))

    def _emit(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._window, self._read = self._read, len(self._ids)
        self._shown = self._decode(self._ids[self._window : self._read])
        return piece


class StopStrings:
    """Passes text on until one of the strings appears in it; text that may be the beginning of one is held back."""

    def __init__(self, strings: Sequence[str]):
        self.strings = tuple(strings)
        self.found = False
        self._held = ""

    def pass_on(self, piece: str) -> str:
        """The part of the text so far that can be shown now."""
        text = self._held + piece
        starts = [at for at in (text.find(s) for s in self.strings) if at >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        held = max((_overlap(text, s) for s in self.strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, string: str) -> int:
    """Length of the longest beginning of `string` (but not all of it) that `text` ends with."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
