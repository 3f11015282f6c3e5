"""Our models are for megatron-core 0.16; an older one is refused in a line."""

import importlib.metadata

import pytest

from mindspeed_llm.errors import UserError
from mindspeed_llm.models import build


@pytest.mark.parametrize("version, refused", [("0.15.3", True), ("0.16.0", False), ("0.16.1", False)])
def test_an_older_megatron_core_is_refused(monkeypatch, version, refused):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if not refused:
        return build.check_megatron_version()
    with pytest.raises(UserError, match="0.15.3 is wrong.*legal: .*try: "):
        build.check_megatron_version()
