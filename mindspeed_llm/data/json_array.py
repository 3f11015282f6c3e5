"""A JSON array of rows read in blocks: files may be larger than memory, rows may not."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mindspeed_llm.errors import UserError

BLOCK_BYTES = 1 << 20
# What ends this close to the end of what was read may go on in the next block: "1." or "-Infinit" of a number, the six
# characters of an escape. Strings are longer, but a decoder says of them that they do not end.
UNDECIDED = 16
SEPARATORS = re.compile(r"[ \t\r\n,]*")


def array_rows(file: Path) -> Iterator[tuple[int, Any, int]]:
    """Elements of one JSON array.

    Memory is bounded by a block and twice the largest element.

    Yields:
        The line that the element starts on, or its number where all stand on one line; the element; its characters.

    Raises:
        UserError: an element is not JSON, or the array does not end.
        UnicodeDecodeError: the file is not UTF-8.
    """
    one_line = _is_one_line(file)
    decoder = json.JSONDecoder()
    with open(file, "rb") as stream:
        window = _Window(stream)
        while (opening := window.text.find("[")) < 0:
            window.read_on(0)
        position = opening + 1
        line = 1 + window.text.count("\n", 0, position)
        while True:
            start = SEPARATORS.match(window.text, position).end()
            line += window.text.count("\n", position, start)
            if start == len(window.text):
                if window.ended:
                    raise UserError(f"input: '{file}' is cut off, because its JSON array does not end")
                position = window.read_on(start)
                continue
            if window.text[start] == "]":
                return
            try:
                row, position = decoder.raw_decode(window.text, start)
                decided = position
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string")
                decided = len(window.text) if cut else error.pos
                if window.ended or decided < len(window.text) - UNDECIDED:
                    # Nothing after a broken element can be told apart, so this is not one bad row.
                    lineno = window.lines_before + error.lineno
                    raise UserError(
                        f"input: {file}:{lineno} is not JSON ({error.msg}); legal: an array of objects"
                    ) from error
            if not window.ended and decided >= len(window.text) - UNDECIDED:
                position = window.read_on(start)
                continue
            yield line, row, position - start
            line += one_line or window.text.count("\n", start, position)


class _Window:
    """Consecutive text of a file, from the element that is being read on.

    Attributes:
        text: what has been read of it, with "\n" for every kind of line end.
        lines_before: line ends in front of it.
        ended: nothing comes after it.
    """

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
        self.text, self.lines_before, self.ended = "", 0, False

    def read_on(self, start: int) -> int:
        """Forget what is in front of `start` and read at least as much as is kept; where `start` is then."""
        self.lines_before += self.text.count("\n", 0, start)
        kept = self.text[start:]
        self.text = ""  # not needed while the next block is decoded
        block = self._stream.read(max(BLOCK_BYTES, len(kept)))
        self.ended = not block
        self.text = kept + self._decoder.decode(block, final=self.ended)
        return 0


def _is_one_line(file: Path) -> bool:
    """Whether no line ends between the first and the last character that is not white."""
    begun = ended_line = False
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            text = block if begun else block.lstrip(codecs.BOM_UTF8 + b" \t\r\n")
            begun = begun or bool(text)
            if ended_line and text.strip():
                return False
            inside = text.rstrip()
            if b"\n" in inside or b"\r" in inside:
                return False
            ended_line = ended_line or b"\n" in text or b"\r" in text
    return True
