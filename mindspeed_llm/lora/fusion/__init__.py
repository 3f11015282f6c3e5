"""Base and adapter of a tensor-parallel linear whose communication runs beside their products (docs/lora-fusion.md)."""
