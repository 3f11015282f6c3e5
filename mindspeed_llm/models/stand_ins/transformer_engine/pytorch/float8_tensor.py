"""Tensors in 8 bits. There are none; programs ask whether a parameter is one."""

from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.tensor import QuantizedTensor


class Float8Tensor(QuantizedTensor):
    """The class of tensors scaled as a whole."""
