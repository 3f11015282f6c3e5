"""Mixture of experts: router, experts, shared experts, auxiliary losses, on megatron-core's MoELayer."""
