"""The gradient of one rank before it is reduced with others': a rank whose hardware errs stands out here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mindspeed_llm.training.monitor.norms import square_sum


class LocalGradient:
    """Measures gradients in the iterations that `recording` is set for, where megatron-core finishes them.

    Args:
        wrapped: this rank's chunks inside DistributedDataParallel, without --overlap-grad-reduce.
    """

    def __init__(self, wrapped: Sequence[torch.nn.Module]) -> None:
        self.recording, self.square_norm = False, 0.0
        self._wrapped, self._config = wrapped, wrapped[0].module.config
        self._finish = self._config.finalize_model_grads_func
        self._config.finalize_model_grads_func = self._measure_and_finish

    def _measure_and_finish(self, *arguments: Any, **named: Any) -> Any:
        if self.recording:
            gradients = [p.main_grad for w in self._wrapped for p in w.module.parameters() if p.requires_grad]
            self.square_norm = float(sum(square_sum(gradient) for gradient in gradients))
        return self._finish(*arguments, **named)

    def close(self) -> None:
        """Leave the model as it was."""
        self._config.finalize_model_grads_func = self._finish
