"""Tokenizers behind one small interface: an HF directory, a `tokenizer.json` or a sentencepiece `tokenizer.model`.

A `tokenizer.json` is read by the `tokenizers` library directly, so preprocessing does not wait for transformers.
Encoding never adds special tokens: templates and handlers say where they go.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mindspeed_llm.data.hub import hub_answers
from mindspeed_llm.errors import UserError

SENTENCEPIECE_TYPES = ("Llama2Tokenizer", "GPTSentencePieceTokenizer")
TOKENIZER_TYPES = ("PretrainedFromHF", *SENTENCEPIECE_TYPES)
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """What every tokenizer offers.

    Attributes:
        source: directory, file or hub name it came from.
        bos_token_id, eos_token_id, pad_token_id: ids, None where the tokenizer has none. pad falls back to eos.
        vocab_size: number of ids including added tokens; every id is below it.
        backend: the `tokenizers.Tokenizer` for batch encoding, None for sentencepiece.
    """

    backend: Any = None

    def __init__(self, source: str, special: dict[str, str | None], trust_remote_code: bool = False) -> None:
        self.source = source
        self.trust_remote_code = trust_remote_code
        self.special_tokens = {name: special.get(name) for name in SPECIAL_NAMES}
        for name, token in self.special_tokens.items():
            if token is not None and self.convert_tokens_to_ids(token) is None:
                raise UserError(f"tokenizer: {name}={token!r} of '{source}' is not in its vocabulary")

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens[name]
        return None if token is None else self.convert_tokens_to_ids(token)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, None when there is none."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, None when there is none."""
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id that fills rows up; eos where there is none of its own."""
        pad = self._special_id("pad_token")
        return self.eos_token_id if pad is None else pad

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens around it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts, in parallel where the implementation can."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; special tokens are shown unless skipped."""
        raise NotImplementedError

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of exactly this token, or None if the vocabulary lacks it."""
        raise NotImplementedError

    def convert_ids_to_tokens(self, index: int) -> str:
        """The token with this id, as the vocabulary spells it."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hex digest that changes whenever encoding, bos or eos could change. The chat template has no part in it."""
        raise NotImplementedError

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template that came with the tokenizer, or None."""
        return None

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """Text of a conversation by the tokenizer's own chat template (rendered by transformers).

        Args:
            messages: dicts with `role` and `content`.
            options: `add_generation_prompt` and variables of the template.

        Raises:
            UserError: the tokenizer has no chat template, or it rejects the conversation.
        """
        if self.chat_template is None:
            raise UserError(
                f"tokenizer: '{self.source}' has no chat template, because neither tokenizer_config.json nor "
                "chat_template.jinja defines one; try: --prompt-type with a named template"
            )
        from transformers.utils.chat_template_utils import render_jinja_template

        special = {name: token for name, token in self.special_tokens.items() if token is not None}
        try:
            rendered, _ = render_jinja_template(
                conversations=[messages], chat_template=self.chat_template, **{**special, **options}
            )
        except Exception as error:
            # Templates refuse conversations by raising inside Jinja; the row is at fault, not the program.
            raise UserError(f"chat template of '{self.source}': conversation refused, because {error}") from error
        return rendered[0]


class FastTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` with the special tokens of its tokenizer_config.json."""

    def __init__(
        self,
        backend: Any,
        source: str,
        special: dict[str, str | None],
        chat_template: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        self._chat_template = chat_template
        super().__init__(source, special, trust_remote_code)

    @cached_property
    def vocab_size(self) -> int:
        # Ids may have holes (an added token placed beyond the model's vocabulary), so the count is not enough.
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.backend.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def convert_ids_to_tokens(self, index: int) -> str:
        return self.backend.id_to_token(int(index))

    def fingerprint(self) -> str:
        # Saving again by another version may change post-processor, padding or pad token: none of them matters here.
        described = json.loads(self.backend.to_str())
        parts = [described[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")]
        parts += [self.special_tokens["bos_token"], self.special_tokens["eos_token"]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def chat_template(self) -> str | None:
        return self._chat_template


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model file used as it is; bos, eos, unk and pad are those the model declares."""

    def __init__(self, model_file: Path, chat_template: str | None = None) -> None:
        import sentencepiece

        self.model_file = str(model_file)
        self._model = sentencepiece.SentencePieceProcessor(model_file=self.model_file)
        self._chat_template = chat_template
        ids = {name: getattr(self._model, f"{name[:3]}_id")() for name in SPECIAL_NAMES}
        super().__init__(
            self.model_file, {name: self._model.id_to_piece(i) if i >= 0 else None for name, i in ids.items()}
        )

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`. Control tokens have no text in a sentencepiece model, so they are spelled out or skipped."""
        pieces: list[str] = []
        run: list[int] = []
        for index in map(int, ids):
            if not self._model.is_control(index):
                run.append(index)
                continue
            pieces.append(self._model.decode(run))
            run = []
            if not skip_special_tokens:
                pieces.append(self._model.id_to_piece(index))
        return "".join([*pieces, self._model.decode(run)])

    def convert_tokens_to_ids(self, token: str) -> int | None:
        index = self._model.piece_to_id(token)
        return index if self._model.id_to_piece(index) == token else None

    def convert_ids_to_tokens(self, index: int) -> str:
        return self._model.id_to_piece(int(index))

    def fingerprint(self) -> str:
        return hashlib.sha256(Path(self.model_file).read_bytes()).hexdigest()

    @property
    def chat_template(self) -> str | None:
        return self._chat_template

    def __getstate__(self) -> dict[str, Any]:
        return {"model_file": self.model_file, "chat_template": self._chat_template}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model_file"], state["chat_template"])


def load_tokenizer(
    path: str | os.PathLike[str],
    tokenizer_type: str = "PretrainedFromHF",
    use_fast: bool = True,
    trust_remote_code: bool = False,
) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: HF directory, `tokenizer.json` or `tokenizer.model` file, or the name of a hub model.
        tokenizer_type: "PretrainedFromHF", or "Llama2Tokenizer" / "GPTSentencePieceTokenizer" for the sentencepiece
            file.
        use_fast: False insists on the sentencepiece file even where a tokenizer.json lies beside it.
        trust_remote_code: allow code from the model directory (tokenizers that exist only as code).

    Raises:
        UserError: nothing loadable is there.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise UserError(f"tokenizer-type: {tokenizer_type!r} is unknown; legal: {', '.join(TOKENIZER_TYPES)}")
    given, path = os.fspath(path), Path(path)
    if path.is_file():
        return _load_file(path, tokenizer_type, use_fast)
    if path.is_dir():
        return _load_directory(path, tokenizer_type in SENTENCEPIECE_TYPES or not use_fast, trust_remote_code)
    # pathlib drops "./" and the last slash, by which one says that no hub name is meant.
    if not HUB_NAME.fullmatch(given) or tokenizer_type in SENTENCEPIECE_TYPES:
        raise UserError(
            f"tokenizer: '{given}' does not exist; legal: an HF directory, tokenizer.json or tokenizer.model"
        )
    return _load_with_transformers(str(path), trust_remote_code)


def _load_file(path: Path, tokenizer_type: str, use_fast: bool) -> Tokenizer:
    if path.suffix == ".model":
        return SentencePieceTokenizer(path, _chat_template(path.parent, {}))
    if path.suffix == ".json" and tokenizer_type == "PretrainedFromHF" and use_fast:
        return _load_tokenizer_json(path)
    wanted = "a tokenizer.json or tokenizer.model" if tokenizer_type == "PretrainedFromHF" else "a tokenizer.model"
    raise UserError(f"tokenizer: '{path}' cannot be read as {tokenizer_type} (use_fast={use_fast}); legal: {wanted}")


def _load_directory(directory: Path, sentencepiece_only: bool, trust_remote_code: bool) -> Tokenizer:
    model_file, json_file = directory / "tokenizer.model", directory / "tokenizer.json"
    if sentencepiece_only:
        if not model_file.is_file():
            raise UserError(
                f"tokenizer: '{directory}' has no tokenizer.model, which Llama2Tokenizer and --tokenizer-not-use-fast "
                "need; try: --tokenizer-type PretrainedFromHF without --tokenizer-not-use-fast"
            )
        return SentencePieceTokenizer(model_file, _chat_template(directory, _read_config(directory)))
    if json_file.is_file():
        return _load_tokenizer_json(json_file)
    if not any((directory / name).is_file() for name in ("tokenizer.model", "tokenizer_config.json", "vocab.json")):
        raise UserError(
            f"tokenizer: '{directory}' holds no tokenizer; legal: a directory with tokenizer.json, tokenizer.model or "
            "tokenizer_config.json; try: --tokenizer-name-or-path"
        )
    return _load_with_transformers(str(directory), trust_remote_code)


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates: HF uses the one called default
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _load_tokenizer_json(file: Path) -> FastTokenizer:
    import tokenizers

    config = _read_config(file.parent)
    backend = tokenizers.Tokenizer.from_file(str(file))
    for index, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        if backend.token_to_id(token["content"]) is None:
            backend.add_tokens([tokenizers.AddedToken(**token)])
        if backend.token_to_id(token["content"]) != int(index):
            raise UserError(
                f"tokenizer: '{file.parent}' gives {token['content']!r} the id {index} in tokenizer_config.json and "
                f"{backend.token_to_id(token['content'])} in tokenizer.json; try: save the tokenizer again"
            )
    special_file = file.parent / "special_tokens_map.json"
    declared = json.loads(special_file.read_text(encoding="utf-8")) if special_file.is_file() else {}
    special = {name: _token_text(config.get(name, declared.get(name))) for name in SPECIAL_NAMES}
    return FastTokenizer(backend, str(file.parent), special, _chat_template(file.parent, config))


def _token_text(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _load_with_transformers(name: str, trust_remote_code: bool) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=os.path.isdir(name) or not hub_answers()
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"tokenizer: '{name}' could not be loaded, because {reason}; legal: an HF directory, tokenizer.json or "
            "tokenizer.model, or a hub name while the hub is reachable"
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise UserError(
            f"tokenizer: '{name}' exists only as {type(loaded).__name__} in Python, which cannot be shared between "
            "processes here; try: convert it to a tokenizer.json"
        )
    special = {key: getattr(loaded, key, None) for key in SPECIAL_NAMES}
    template = loaded.chat_template if isinstance(loaded.chat_template, str) else None
    return FastTokenizer(loaded.backend_tokenizer, name, special, template, trust_remote_code)
