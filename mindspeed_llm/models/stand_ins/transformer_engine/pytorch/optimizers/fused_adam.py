"""Transformer Engine's FusedAdam: AdamW with moments, and copies of the parameters, in dtypes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from mindspeed_llm.models.stand_ins.transformer_engine.refusal import refuse

_SMALLEST = torch.finfo(torch.float32).tiny


class FusedAdam(torch.optim.Optimizer):
    """Adam (arXiv:1412.6980), with decoupled weight decay (arXiv:1711.05101) where adam_w_mode, computed in fp32.

    The number of steps is in the parameter group, as Transformer Engine keeps it. Moments in fp16 are stored over a
    scale per tensor. `lr` may be None until the first step: megatron's scheduler sets it.

    Args:
        master_weights: keep each parameter in master_weight_dtype and round the parameter from it.
        use_decoupled_grad: take `parameter.decoupled_grad` for the gradient.
        store_param_remainders: Transformer Engine keeps only what bf16 parameters lack of their fp32 copies; here the
            copies are whole, of the same values.

    Raises:
        UserError: AMSGrad, 8-bit states, or states to be captured in a CUDA graph.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ):
        given = {"amsgrad": amsgrad, "capturable": capturable, "bias_correction=False": not bias_correction}
        if asked := [name for name, value in given.items() if value]:
            raise refuse(f"FusedAdam's {', '.join(asked)}", "bias correction, no AMSGrad, no CUDA graphs")
        self.adam_w_mode, self.master_weights = adam_w_mode, master_weights
        self.use_decoupled_grad = use_decoupled_grad
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": master_weight_dtype}
        for name, dtype in self.dtypes.items():
            if not dtype.is_floating_point or dtype.itemsize < 2:
                raise refuse(f"FusedAdam's {name} in {dtype}", "float32, bfloat16, float16")
        self._scales: dict[Tensor, dict[str, Tensor]] = {}
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, decoupled ones too."""
        super().zero_grad(set_to_none)
        if self.use_decoupled_grad:
            for parameter in self._parameters():
                parameter.decoupled_grad = None

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def get_unscaled_state(self, param: Tensor, state_name: str) -> Tensor:
        """A state's values in fp32; the state itself where it is stored so."""
        stored = self.state[param][state_name]
        scale = self._scales.get(param, {}).get(state_name)
        return stored.float() if scale is None else stored.float() * scale

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Store a state's values given in fp32."""
        dtype = self.dtypes[state_name]
        if dtype == torch.float16:
            scale = (unscaled_state.abs().max() / torch.finfo(dtype).max).clamp_min(_SMALLEST)
            self._scales.setdefault(param, {})[state_name] = scale
            unscaled_state = unscaled_state / scale
        stored = self.state[param].get(state_name)
        if stored is None:
            self.state[param][state_name] = unscaled_state.to(dtype, copy=True)
        elif stored is not unscaled_state:
            stored.copy_(unscaled_state)

    def initialize_state(self, param: Tensor, store_param_remainders: bool = False) -> None:
        """Make the states of a parameter: moments of zero, and its copy."""
        zero = torch.zeros_like(param, dtype=torch.float32)
        self.set_scaled_state(param, "exp_avg", zero)
        self.set_scaled_state(param, "exp_avg_sq", zero)
        if self.master_weights:
            self.set_scaled_state(param, "master_param", param.detach().float())

    def state_dict(self) -> dict[str, Any]:
        """torch's, with states in fp32."""
        found = super().state_dict()
        for index, param in enumerate(self._parameters()):
            if param in self.state:
                wide = {name: self.get_unscaled_state(param, name) for name in self.state[param] if name in self.dtypes}
                found["state"][index] = {**self.state[param], **wide}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a `state_dict`; states are stored in this optimizer's dtypes."""
        super().load_state_dict(state_dict)
        identities = [identity for group in state_dict["param_groups"] for identity in group["params"]]
        for identity, param in zip(identities, self._parameters()):
            for name, value in state_dict["state"].get(identity, {}).items():
                if name in self.dtypes:
                    self.state[param].pop(name, None)
                    self.set_scaled_state(param, name, value.to(param.device, torch.float32))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, grad_scaler: Any = None) -> Any:
        """One step of every parameter that has a gradient."""
        if grad_scaler is not None:
            raise refuse("FusedAdam's grad_scaler", "None: gradients that are unscaled before the step")
        loss = None if closure is None else closure()
        for group in self.param_groups:
            if group["params"]:
                group["step"] = int(group.get("step", 0)) + 1
                self._step(group)
        return loss

    def _step(self, group: dict[str, Any]) -> None:
        of_gradient = "decoupled_grad" if self.use_decoupled_grad else "grad"
        params = [param for param in group["params"] if getattr(param, of_gradient, None) is not None]
        for param in params:
            if not self.state[param]:
                self.initialize_state(param)
        names = ("exp_avg", "exp_avg_sq", *(("master_param",) if self.master_weights else ()))
        wide = {name: [self.get_unscaled_state(param, name) for param in params] for name in names}
        values = wide.get("master_param", [param.detach().float() for param in params])
        adam(
            values,
            [getattr(param, of_gradient).float() for param in params],
            wide["exp_avg"],
            wide["exp_avg_sq"],
            [],
            # torch counts the step itself
            [torch.tensor(float(group["step"] - 1)) for _ in params],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=self.adam_w_mode,
        )
        for index, param in enumerate(params):
            for name in names:
                self.set_scaled_state(param, name, wide[name][index])
            if values[index] is not param:
                param.copy_(values[index])
