"""Plain text columns for pre-training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from mindspeed_llm.data.handlers.base import ChunkResult, Handler, concatenate
from mindspeed_llm.data.indexed import token_dtype
from mindspeed_llm.data.sources import Chunk
from mindspeed_llm.data.tokenizer import Tokenizer
from mindspeed_llm.errors import UserError


class GeneralPretrainHandler(Handler):
    """Every column of `json_keys` becomes a stream `<key>_document`, one document per row.

    Args:
        json_keys: columns to tokenize.
        append_eod: end every document with eos.

    Raises:
        UserError: `append_eod` without an eos token, or the same column twice.
    """

    stage: ClassVar[str] = "pretrain"

    def __init__(self, tokenizer: Tokenizer, json_keys: list[str], append_eod: bool = False) -> None:
        super().__init__(tokenizer)
        if not json_keys or len(set(json_keys)) != len(json_keys):
            raise UserError(f"json-keys: {json_keys} must be different column names; legal: for instance text")
        if append_eod and tokenizer.eos_token_id is None:
            raise UserError(
                f"append-eod: set, but '{tokenizer.source}' has no eos; try: another tokenizer, or no --append-eod"
            )
        self.json_keys = json_keys
        self.append_eod = append_eod

    @property
    def needed_columns(self) -> list[str]:
        return self.json_keys

    @property
    def stream_dtypes(self) -> dict[str, np.dtype]:
        dtype = token_dtype(self.tokenizer.vocab_size)
        return {f"{key}_document": dtype for key in self.json_keys}

    def process(self, chunk: Chunk) -> ChunkResult:
        """Tokenize a chunk."""
        result = ChunkResult(num_rows=len(chunk.rows), num_bytes=chunk.num_bytes)
        texts: dict[str, list[str]] = {key: [] for key in self.json_keys}
        for number, row in chunk.decode():
            reason = str(row) if isinstance(row, UserError) else self._fault(row)
            if reason:
                result.bad.append((chunk.origin(number), reason))
                continue
            for key in self.json_keys:
                if row[key]:
                    texts[key].append(row[key])
                else:
                    result.dropped["empty text"] += 1
        for key in self.json_keys:
            tokens, lengths = self._tokenize(texts[key], result)
            result.streams[f"{key}_document"] = tokens, lengths
            result.num_trained += len(tokens)
        return result

    def _tokenize(self, texts: list[str], result: ChunkResult) -> tuple[np.ndarray, np.ndarray]:
        sequences = [ids for ids in self.tokenizer.encode_batch(texts) if ids]
        if lost := len(texts) - len(sequences):
            result.dropped["no tokens"] += lost
        if self.append_eod:
            for ids in sequences:
                ids.append(self.tokenizer.eos_token_id)
        return concatenate(sequences, token_dtype(self.tokenizer.vocab_size))

    def _fault(self, row: dict[str, Any]) -> str | None:
        for key in self.json_keys:
            if key not in row:
                return f"no column {key!r} (it has {', '.join(map(repr, row)) or 'none'})"
            if not isinstance(row[key], str):
                return f"column {key!r} is {type(row[key]).__name__}, not text"
        return None

    @classmethod
    def fits(cls, row: dict[str, Any], map_keys: Mapping[str, Any], json_keys: Sequence[str]) -> bool:
        """See the base class."""
        return not map_keys and all(isinstance(row.get(key), str) for key in json_keys)
