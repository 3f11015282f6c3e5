"""Megatron-core training for every device: data, conversion, training, tuning and generation.

Importing this package initialises no device, needs no compiler and loads neither torch nor megatron-core.
"""

__version__ = "0.1.0"

API = ("load_model", "generate", "stream")
ADAPTOR = ("patch", "unpatch")


def __getattr__(name: str):
    """The Python API and the adaptor for somebody else's Megatron program, loaded at their first use."""
    if name in API:
        from mindspeed_llm import api

        return getattr(api, name)
    if name in ADAPTOR:
        from mindspeed_llm import megatron_adaptor

        return getattr(megatron_adaptor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
