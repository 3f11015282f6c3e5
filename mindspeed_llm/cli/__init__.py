"""The doors: parse, plan, and wire the rooms together."""

import os

# torch loads installed device packages when it is imported: torch_npu would read its environment before
# accelerator.npu_environment has set it, and without CANN `import torch` itself would fail. accelerator.npu loads it.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
