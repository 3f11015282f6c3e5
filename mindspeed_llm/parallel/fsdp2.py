"""Fully sharded data parallelism: torch's `fully_shard` (FSDP2) in the place of DistributedDataParallel.

Each parameter is cut along its first dimension over the data-parallel ranks. A layer's are gathered, in the type of the
products, when the layer begins, and let go when it ends, in the forward and in the backward pass; gradients are summed
in fp32 and each rank keeps its part. Trained parameters are fp32 and are the only copy that is kept: what the optimizer
updates. Frozen ones keep the type of the products.

megatron-core 0.16's own wrapper of it (`TorchFullyShardedDataParallel`) is not used: its mesh is of "cuda" devices, its
gradients are means over ranks, its `finish_grad_sync` does not take what `finalize_model_grads` gives it, and its
`scale_gradients` does nothing, while the loss here is divided by the number of trained tokens after the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mindspeed_llm import accelerator
from mindspeed_llm.errors import UserError
from mindspeed_llm.parallel.shards import Shard

# What is asked of torch's FSDPModule beyond its first release.
NEEDED = ("set_gradient_divide_factor", "set_force_sum_reduction_for_comms", "set_reduce_scatter_unused_params")


class FullySharded(nn.Module):
    """A model whose parameters, gradients and optimizer state are cut over a group.

    It has the interface of megatron-core's DistributedDataParallel that schedules and optimizers use.

    Args:
        module: with its weights; trained parameters become fp32 here.
        group: the ranks that see different tokens of the global batch; gradients are summed over them.
        units: modules that are gathered each by itself; their parameters are used in their own forward alone. What is
            in none of them is gathered for the whole pass.
        reshard_after_forward: let a unit's parameters go after its forward pass and gather them again for the backward
            pass; False keeps them in between.

    Attributes:
        shards: of all parameters, by their names in the module, in the same order on all ranks.

    Raises:
        UserError: this torch cannot sum gradients as needed.
    """

    def __init__(
        self, module: nn.Module, group: dist.ProcessGroup, units: Sequence[nn.Module], reshard_after_forward: bool
    ) -> None:
        from megatron.core.distributed import DistributedDataParallelConfig

        super().__init__()
        self.module, self.config = module, module.config
        self.ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
        attributes = {name: dict(vars(parameter)) for name, parameter in module.named_parameters()}
        shard_in_place(module, group, units, reshard_after_forward)
        self.shards = {
            name: _shard(parameter, group, dtypes[name], attributes[name])
            for name, parameter in module.named_parameters()
        }

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The module's; without gradients it leaves nothing gathered behind."""
        output = self.module(*inputs, **named)
        if not torch.is_grad_enabled():
            self.reshard()
        return output

    def reshard(self) -> None:
        """Let go whatever is gathered: the module's parameters are those of the shards again."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def zero_grad_buffer(self) -> None:
        """Forget the gradients."""
        self.reshard()
        for shard in self.shards.values():
            shard.parameter.grad = shard.parameter.main_grad = None

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Let megatron-core find this rank's part of each gradient, as `main_grad`; all is reduced already.

        Raises:
            RuntimeError: a trained parameter has no gradient.
        """
        for name, shard in self.shards.items():
            shard.parameter.main_grad = shard.gradient
            if shard.parameter.requires_grad and shard.gradient is None:
                raise RuntimeError(f"{name} is trained and has no gradient after the backward pass")

    def scale_gradients(self, scaling_factor: Tensor | float) -> None:
        """Multiply all gradients."""
        for shard in self.shards.values():
            if shard.gradient is not None:
                shard.gradient.mul_(scaling_factor)


def shard_in_place(
    module: nn.Module, group: dist.ProcessGroup, units: Sequence[nn.Module], reshard_after_forward: bool
) -> None:
    """Let torch cut a module's parameters, see `FullySharded`; gradients are sums over the group, in fp32.

    Raises:
        UserError: this torch cannot sum gradients as needed.
    """
    if missing := [name for name in NEEDED if not hasattr(FSDPModule, name)]:
        raise UserError(
            f"--use-torch-fsdp2: torch {torch.__version__} is wrong, because its FSDPModule has no {missing[0]}; "
            "legal: a newer one, 2.13 is tested; try: --use-distributed-optimizer"
        )
    policy = MixedPrecisionPolicy(
        param_dtype=module.config.params_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    mesh = DeviceMesh.from_group(group, accelerator.current().device_type)
    for unit in (*units, module):
        for parameter in unit.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.float()
        whole_pass = unit is module or not reshard_after_forward
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=not whole_pass)
        # Sums: the loss is a sum over tokens, divided when all are counted.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    # An expert that no token of this rank chose takes part in the sum all the same.
    module.set_reduce_scatter_unused_params(True)


def _shard(
    parameter: nn.Parameter, group: dist.ProcessGroup, compute_dtype: torch.dtype, attributes: Mapping[str, Any]
) -> Shard:
    """Describe what this rank holds; the attributes by which megatron-core knows a parameter go with it."""
    local = parameter._local_tensor
    rows = -(-parameter.shape[0] // group.size())
    width = parameter.numel() // parameter.shape[0]
    start = min(group.rank() * rows, parameter.shape[0]) * width
    main = nn.Parameter(local.detach(), requires_grad=parameter.requires_grad)
    for each in (parameter, main):
        vars(each).update(attributes)
    shard = Shard(parameter, main, start, start + local.numel(), compute_dtype)
    shard.announce()
    return shard
