"""Megatron-core training for every device: data, conversion, training, tuning and generation.

Importing this package initialises no device, needs no compiler and loads neither torch nor megatron-core.
"""

__version__ = "0.1.0"
