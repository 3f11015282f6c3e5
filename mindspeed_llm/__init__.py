"""Megatron-core training for every device: data, conversion, training, tuning and generation.

Importing this package initialises no device, needs no compiler and loads neither torch nor megatron-core.
"""

__version__ = "0.1.0"

API = ("load_model", "generate", "stream")


def __getattr__(name: str):
    """The Python API, loaded at its first use."""
    if name in API:
        from mindspeed_llm import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
