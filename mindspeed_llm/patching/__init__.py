"""The mechanism of patching: declare, apply, list, explain, undo. It knows no patch by name."""

from mindspeed_llm.patching.patch import Patch, fingerprint
from mindspeed_llm.patching.registry import applied, apply, undo, why

__all__ = ["Patch", "applied", "apply", "fingerprint", "undo", "why"]
