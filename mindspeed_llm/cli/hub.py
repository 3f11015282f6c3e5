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
        given = getattr(section, name)
        if given is None:
            continue
        found = []
        for value in given if isinstance(given, list) else [given]:
            is_name = value != config.checkpoint.save and not Path(value).exists() and HUB_NAME.fullmatch(value)
            try:
                found.append(str(resolve_model(value, config.checkpoint.hub)) if is_name else value)
            except UserError as wrong:
                problems.append(f"--{name.replace('_', '-')}: {value} is no directory here; {wrong}")
                found.append(value)
        setattr(section, name, found if isinstance(given, list) else found[0])
