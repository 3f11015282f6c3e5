"""Prompt files and answer files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindspeed_llm.errors import UserError

LEGAL = "a .txt file with a prompt a line, a .json list or a .jsonl file of texts or of objects with prompt/instruction"


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file.

    Args:
        path: .txt (one a line, empty lines left out), .json (a list) or .jsonl; entries are texts, or objects with
            "prompt", or with "instruction" and maybe "input".

    Raises:
        UserError: not there, another format, an entry without a prompt (named by its number), or no entries.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--prompt-file: {path} does not exist; legal: {LEGAL}")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        prompts = [line for line in text.splitlines() if line.strip()]
    elif path.suffix in (".json", ".jsonl"):
        prompts = [_prompt(entry, path, n) for n, entry in enumerate(_entries(text, path), 1)]
    else:
        raise UserError(f"--prompt-file: {path} has an unknown suffix; legal: {LEGAL}")
    if not prompts:
        raise UserError(f"--prompt-file: {path} holds no prompt; legal: {LEGAL}")
    return prompts


def _entries(text: str, path: Path) -> list[Any]:
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--prompt-file: {path} is not valid {path.suffix[1:]} ({error}); legal: {LEGAL}") from error
    if not isinstance(entries, list):
        raise UserError(f"--prompt-file: {path} holds a {type(entries).__name__}; legal: {LEGAL}")
    return entries


def _prompt(entry: Any, path: Path, number: int) -> str:
    if isinstance(entry, dict):
        parts = [entry[k] for k in ("instruction", "input") if entry.get(k)] if "instruction" in entry else []
        entry = entry.get("prompt", "\n".join(map(str, parts)) or None)
    if not isinstance(entry, str) or not entry:
        raise UserError(f"--prompt-file: entry {number} of {path} has no prompt; legal: {LEGAL}")
    return entry


def write_answers(path: str | Path, prompts: Sequence[str], answers: Sequence[str]) -> None:
    """Write {"prompt", "answer"} a line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for prompt, answer in zip(prompts, answers, strict=True):
            file.write(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n")
