"""Raw data to token streams to batches. Nothing here imports megatron-core; preprocessing does not import torch."""
