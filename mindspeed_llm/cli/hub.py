"""Hub names on a command line, replaced by the local directory they were downloaded to."""

from __future__ import annotations

import re
from pathlib import Path

from mindspeed_llm.checkpoint.hub import resolve_model
from mindspeed_llm.config.run import RunConfig
from mindspeed_llm.errors import UserError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def download_models(config: RunConfig, problems: list[str]) -> None:
    """Make `--load` and `--lora-load` local, before process groups exist; what cannot be had becomes a problem.

    A path that exists is left alone, and so is one that is no hub name or that `--save` will create.
    """
    for section, name in ((config.checkpoint, "load"), (config.lora, "lora_load")):
        value = getattr(section, name)
        if value is None or value == config.checkpoint.save or Path(value).exists() or not HUB_NAME.fullmatch(value):
            continue
        try:
            setattr(section, name, str(resolve_model(value, config.checkpoint.hub)))
        except UserError as wrong:
            problems.append(f"--{name.replace('_', '-')}: {value} is no directory here; {wrong}")
