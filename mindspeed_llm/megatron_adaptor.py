"""One import that makes a Megatron program run on this device: `import mindspeed_llm.megatron_adaptor`.

Importing it binds the torch facade inside `megatron.*` (see accelerator/torch_facade.py) and applies the patches that
need no configuration. `patch(config)` adds the conditional ones once the configuration is final; `unpatch()` puts
everything back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mindspeed_llm import accelerator, patching
from mindspeed_llm.accelerator import torch_facade


def patch(config: Any = None, prefixes: Sequence[str] = torch_facade.DEFAULT_PREFIXES) -> list[str]:
    """Install the facade in modules below `prefixes` and apply the patches; a second call adds only what is new.

    Args:
        config: the final configuration, which decides the conditional patches; None leaves those out.
        prefixes: module prefixes that see the facade, e.g. ("megatron", "__main__") for somebody else's program.

    Returns:
        Names of the patches newly applied.
    """
    torch_facade.install(accelerator.current(), tuple(prefixes))
    from mindspeed_llm.patches import catalogue

    return patching.apply(catalogue(), config)


def unpatch() -> None:
    """Take every patch and the facade away again."""
    patching.undo()
    torch_facade.uninstall()


patch()
