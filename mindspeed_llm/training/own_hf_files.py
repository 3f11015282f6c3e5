"""config.json and tokenizer for checkpoints of a model whose shape came from flags."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from mindspeed_llm.data.tokenizer import load_tokenizer
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config_writer import hf_config_of
from mindspeed_llm.plan.plan import Plan

DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Of the directory that a tokenizer comes from; the rest there is of another model.
TOKENIZER_FILES = ("*token*.json", "vocab.*", "merges.txt", "chat_template.*", "*.model")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def make_hf_files(plan: Plan) -> tempfile.TemporaryDirectory | None:
    """A directory with the files, which lives as long as what is returned.

    None for a model of a Hugging Face directory, which has its own, and for one that no config.json describes; that is
    said.
    """
    if plan.hf_files is not None:
        return None
    try:
        config = hf_config_of(plan.shape)
    except UserError as reason:
        print(f"note: checkpoints carry no config.json and cannot be exported by themselves: {reason}", flush=True)
        return None
    made = tempfile.TemporaryDirectory(prefix="mindspeed_llm-hf-")
    target = Path(made.name)
    config |= {"dtype": DTYPE_NAMES[plan.dtype_name], "torch_dtype": DTYPE_NAMES[plan.dtype_name]}
    ids = _with_tokenizer(plan, target)
    _write(target / "config.json", config | ids)
    _write(target / "generation_config.json", ids)
    return made


def _with_tokenizer(plan: Plan, target: Path) -> dict[str, int]:
    """Copy the tokenizer's files; its special tokens' ids, without which transformers takes its own defaults."""
    t, source = plan.config.tokenizer, plan.tokenizer
    if source is None or not Path(source).exists():
        print(f"note: checkpoints carry no tokenizer: {source or 'none is named'} is no local one", flush=True)
        return {}
    path = Path(source)
    for pattern in TOKENIZER_FILES if path.is_dir() else ():
        for file in path.glob(pattern):
            shutil.copyfile(file, target / file.name)
    if path.is_file():
        shutil.copyfile(path, target / ("tokenizer.model" if path.suffix == ".model" else "tokenizer.json"))
    tokenizer = load_tokenizer(
        source, t.tokenizer_type, not t.tokenizer_not_use_fast, trust_remote_code=t.trust_remote_code
    )
    return {name: value for name in SPECIAL_IDS if (value := getattr(tokenizer, name)) is not None}


def _write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
