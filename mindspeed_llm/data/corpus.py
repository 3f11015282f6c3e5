"""A real English corpus that is on every machine: the documentation of Python's standard library.

Docstrings and `pydoc_data.topics`, grouped by module, so that a split by module leaks nothing from one side to the
other. The texts differ between Python versions. Used by the quickstart and the tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import pkgutil
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Modules that do something when imported (open a browser, print, draw), or that are tests, or tools with a display.
SKIPPED = ("antigravity", "this", "idlelib", "turtledemo", "turtle", "tkinter", "test", "lib2to3", "__phello__")
# Submodules that run something, or belong to another platform or to tests.
SKIPPED_SUBMODULES = ("tests", "test", "windows_events", "windows_utils", "popen_spawn_win32", "msvccompiler")
SHORTEST = 40  # characters; shorter docstrings say no more than the name does
HELD_OUT_PERCENT = 10


@dataclass(frozen=True)
class Document:
    """One docstring: `name` is its dotted path, `module` the group that a split keeps together."""

    module: str
    name: str
    text: str


@cache
def stdlib_documents() -> tuple[Document, ...]:
    """All documents in a fixed order (by module, then as the module defines them), each text once."""
    seen: set[str] = set()
    documents = []
    for document in _all_documents():
        text = document.text.strip()
        if len(text) >= SHORTEST and text not in seen:
            seen.add(text)
            documents.append(Document(document.module, document.name, text))
    return tuple(documents)


def _all_documents() -> Iterator[Document]:
    for name in _module_names():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except (ImportError, OSError):  # belongs to another platform
            continue
        yield from _module_documents(name, module)
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"topic {name}", name, text)


def _module_names() -> Iterator[str]:
    """Public modules of the standard library and the public submodules of its packages."""
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in SKIPPED:
            continue
        yield name
        spec = importlib.util.find_spec(name)
        for path in (spec.submodule_search_locations if spec else None) or ():
            for info in sorted(pkgutil.iter_modules([path]), key=lambda info: info.name):
                if not info.name.startswith("_") and info.name not in SKIPPED_SUBMODULES:
                    yield f"{name}.{info.name}"


def _module_documents(name: str, module: Any) -> Iterator[Document]:
    if isinstance(module.__doc__, str):
        yield Document(name, name, inspect.cleandoc(module.__doc__))
    for attribute, value in sorted(vars(module).items()):
        if attribute.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if getattr(value, "__module__", name) != name:  # imported from elsewhere: it belongs to that module
            continue
        yield from _documented(name, f"{name}.{attribute}", value)
        if inspect.isclass(value):
            for method_name, method in sorted(vars(value).items()):
                if not method_name.startswith("_"):
                    yield from _documented(name, f"{name}.{attribute}.{method_name}", method)


def _documented(module: str, name: str, value: Any) -> Iterator[Document]:
    text = getattr(value, "__doc__", None)
    if isinstance(text, str):
        yield Document(module, name, inspect.cleandoc(text))


def is_held_out(module: str) -> bool:
    """Whether a module's documents are kept for evaluation: about one package in ten, fixed by its name."""
    return zlib.crc32(module.split(".")[0].encode()) % 100 < HELD_OUT_PERCENT


def write_stdlib_corpus(directory: str | Path, max_bytes: int | None = None) -> tuple[Path, Path]:
    """Write the corpus as parquet with a column `text`.

    Args:
        max_bytes: stop each file before it exceeds this many bytes of text.

    Returns:
        (train file, held-out file).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for split in ("train", "heldout"):
        texts = [f"{d.name}\n\n{d.text}" for d in _split(split)]
        path = directory / f"corpus_{split}.parquet"
        pq.write_table(pa.table({"text": _capped(texts, max_bytes)}), path)
        paths.append(path)
    return paths[0], paths[1]


def write_stdlib_instructions(directory: str | Path, max_rows: int | None = None) -> tuple[Path, Path]:
    """Write Alpaca rows that ask what a function or class does and answer with its docstring's first paragraph.

    Returns:
        (train file, held-out file), JSON arrays of instruction, input, output.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for split in ("train", "heldout"):
        rows = [
            {"instruction": f"What does {d.name} do?", "input": "", "output": " ".join(d.text.split("\n\n")[0].split())}
            for d in _split(split)
            if "." in d.name and not d.module.startswith("topic ")
        ]
        path = directory / f"instructions_{split}.json"
        path.write_text(json.dumps(rows[:max_rows], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1]


def _split(split: str) -> list[Document]:
    return [d for d in stdlib_documents() if is_held_out(d.module) == (split == "heldout")]


def _capped(texts: list[str], max_bytes: int | None) -> list[str]:
    if max_bytes is None:
        return texts
    kept, size = [], 0
    for text in texts:
        size += len(text.encode())
        if size > max_bytes:
            break
        kept.append(text)
    return kept


# Llama-2 style, with what the chatml and llama3 templates need besides.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
CHAT_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(
    directory: str | Path, vocab_size: int, texts: list[str] | None = None, pad_token: str | None = None
) -> Path:
    """Train a byte-level BPE tokenizer and save it as a Hugging Face directory.

    Args:
        vocab_size: ids including the special tokens.
        texts: what to train on, default the corpus's training part.
        pad_token: None pads with eos; otherwise a token of its own, for instance "<pad>".

    Returns:
        `directory`, with tokenizer.json and tokenizer_config.json.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    special = [*SPECIAL_TOKENS, *([pad_token] if pad_token else []), *CHAT_TOKENS]
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([d.text for d in _split("train")] if texts is None else texts, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": pad_token or "</s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return directory
