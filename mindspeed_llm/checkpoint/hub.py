"""A model's name on a hub -> a local directory. A local directory always wins."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from mindspeed_llm.errors import UserError

_CONFIG_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja")
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
# The same weights once more, as their makers' own programs read them: in a folder (`original/`), or beside the others.
_OTHER_FORMS = ("*/*", "consolidated*")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUBS = ("hf", "modelscope")


def resolve_model(name: str | Path, hub: str = "hf") -> Path:
    """The directory of a model, downloaded on first use.

    Args:
        name: a local directory, or `owner/name` on the hub.
        hub: "hf" (huggingface.co, or the mirror in the environment variable HF_ENDPOINT) or "modelscope".

    Raises:
        UserError: neither a directory nor a hub name, the hub does not answer, or it has no such model.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if hub not in HUBS:
        raise UserError(f"hub: {hub!r} is unknown; legal: {', '.join(HUBS)}")
    if not _HUB_NAME.fullmatch(str(name)):
        raise UserError(f"model: {name} is no directory, and no hub name either; legal: a directory, or owner/name")
    return _from_modelscope(str(name)) if hub == "modelscope" else _from_hugging_face(str(name))


def _from_hugging_face(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # One format of weights is enough; which one exists is only known after asking.
        for weights in _WEIGHT_PATTERNS:
            wanted = [*_CONFIG_PATTERNS, weights]
            directory = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=list(_OTHER_FORMS)))
            if any(directory.glob(weights)):
                return directory
    except Exception as error:  # requests, httpx, OSError and the hub's own types, by version
        raise UserError(
            f"hub: {name} cannot be had from {_endpoint()} ({_first_line(error)}); try: set HF_ENDPOINT to a mirror, "
            f"--hub modelscope, or download it elsewhere and name the directory"
        ) from error
    raise UserError(
        f"hub: {name} on {_endpoint()} has neither *.safetensors nor pytorch_model*.bin; try: a repository with "
        "weights, or a directory"
    )


def _from_modelscope(name: str) -> Path:
    if importlib.util.find_spec("modelscope") is None:
        raise UserError("hub: --hub modelscope needs the package modelscope; try: pip install modelscope, or --hub hf")
    from modelscope import snapshot_download

    try:
        return Path(snapshot_download(name))
    except Exception as error:
        raise UserError(
            f"hub: {name} cannot be had from modelscope ({_first_line(error)}); try: download it elsewhere and "
            "name the directory"
        ) from error


def _endpoint() -> str:
    offline = " in offline mode (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co") + offline


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
