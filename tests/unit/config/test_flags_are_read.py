"""No dead flags: every option is read by name somewhere outside the room that declares it."""

import re
from pathlib import Path

import pytest

from mindspeed_llm.config.run import all_options

PACKAGE = Path(__file__).parents[3] / "mindspeed_llm"
SOURCES = "\n".join(
    p.read_text() for p in PACKAGE.rglob("*.py") if "config" not in p.relative_to(PACKAGE).parts[:1] and p.is_file()
)


@pytest.mark.parametrize("name", sorted(all_options()))
def test_option_is_read(name):
    read_as_attribute = re.search(rf"\.{name}\b", SOURCES)
    read_by_name = re.search(rf"[\"']{name}[\"']", SOURCES)
    assert read_as_attribute or read_by_name, f"nothing reads {name}"
