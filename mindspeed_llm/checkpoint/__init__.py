"""Moving tensors: Hugging Face, Megatron and torch_dist files read and written one tensor at a time, and verified."""
