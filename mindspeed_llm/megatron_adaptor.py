"""One import that makes somebody else's Megatron program run on this device: `import mindspeed_llm.megatron_adaptor`.

It may come before or after megatron's own imports. In the modules of the program, and in no other:
  - the name `torch` means the device at hand where it says CUDA or nccl (accelerator.torch_facade);
  - compiled packages that are not installed (Transformer Engine, Apex's and Megatron's extensions) are answered by our
    operators (models.stand_ins);
  - megatron-core is patched where it has no extension point (patches).
The modules of the program are those of megatron and nvidia_resiliency_ext, the script, what MINDSPEED_LLM_PROGRAM names
(a list with commas), and those that lie beside the program's own copy of megatron: Megatron-LM's scripts and tests,
where it runs from a checkout.
`patch(config)` adds the patches that depend on the configuration; `unpatch()` puts everything back.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from mindspeed_llm import accelerator, patching
from mindspeed_llm.accelerator import torch_facade

ENVIRONMENT_VARIABLE = "MINDSPEED_LLM_PROGRAM"

# megatron, and the script: as it is started, and as processes that it spawns name it; and the package by which megatron
# writes local checkpoints, which asks torch.cuda for its device.
PROGRAM = ("megatron", "__main__", "__mp_main__", "nvidia_resiliency_ext")


def program_directories() -> tuple[str, ...]:
    """Directories that modules are imported from and that hold a `megatron` of their own, but for site-packages."""
    found = [os.path.abspath(entry) for entry in sys.path if os.path.isdir(os.path.join(entry, "megatron"))]
    return tuple(entry for entry in found if os.path.basename(entry) not in ("site-packages", "dist-packages"))


def patch(config: Any = None, prefixes: Sequence[str] | None = None) -> list[str]:
    """Make the modules of a program see this device; a second call adds only what is new.

    Args:
        config: the final configuration, which decides the conditional patches; None leaves those out.
        prefixes: names of the program's modules, with what lies below them; None for `PROGRAM`, those that
            MINDSPEED_LLM_PROGRAM adds, and the modules in `program_directories()`.

    Returns:
        Names of the patches newly applied.

    Raises:
        UserError: a patch does not fit the installed megatron-core.
    """
    from mindspeed_llm import patches
    from mindspeed_llm.models import stand_ins

    directories: tuple[str, ...] = ()
    if prefixes is None:
        directories = program_directories()
        added = os.environ.get(ENVIRONMENT_VARIABLE, "").split(",")
        prefixes = (*PROGRAM, *(name.strip() for name in added if name.strip()))
    torch_facade.install(accelerator.current(), tuple(prefixes), directories=directories, imports=True)
    torch_facade.provide(stand_ins.MODULES, stand_ins.ONLY)
    return patches.apply(config)


def unpatch() -> None:
    """Take the patches, the stand-ins and the facade away again; every name gets back what it was bound to."""
    patching.undo()
    torch_facade.uninstall()


patch()
