"""docs/llama2_flags.md is complete and current."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
spec = importlib.util.spec_from_file_location("llama2_flags", DOCS / "llama2_flags.py")
llama2_flags = importlib.util.module_from_spec(spec)
spec.loader.exec_module(llama2_flags)


def test_the_committed_table_is_what_the_option_tables_say():
    written = (DOCS / "llama2_flags.md").read_text(encoding="utf-8")
    assert written == llama2_flags.markdown(), "run: python docs/llama2_flags.py > docs/llama2_flags.md"


def test_every_upstream_flag_stands_in_the_table():
    written = (DOCS / "llama2_flags.md").read_text(encoding="utf-8")
    flags = llama2_flags.recipe_flags()
    assert len({flag for _, flag, _ in flags}) > 130
    for program, flag, recipes in flags:
        section = written.split(f"\n## {program}\n")[1].split("\n## ")[0]
        assert f"| `{flag}` | {recipes} | " in section


def test_a_flag_nobody_knows_is_seen():
    assert llama2_flags.status("posttrain_gpt.py", "--lora-rr")[0] == "unknown"
