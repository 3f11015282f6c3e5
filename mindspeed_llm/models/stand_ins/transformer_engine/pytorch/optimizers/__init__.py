"""Transformer Engine's optimizers; megatron has its own fallbacks for the kernels beside them."""

from torch.optim import SGD as FusedSGD

from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.optimizers.fused_adam import FusedAdam

__all__ = ["FusedAdam", "FusedSGD"]
