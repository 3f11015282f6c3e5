"""Model families as data: HF names and shapes against megatron-core's, and the one place that builds a model."""
