"""AdamW through megatron-core's optimizers, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mindspeed_llm.checkpoint.optimizer_state import optimizer_parts, own_states
from mindspeed_llm.config.memory import MemoryConfig
from mindspeed_llm.config.training import OptimizerConfig
from mindspeed_llm.errors import UserError
from mindspeed_llm.ops.adamw import FusedAdamW

# What LoRA+ trains faster. PEFT's create_loraplus_optimizer puts vectors, which DoRA's magnitudes are, beside B too.
MAGNITUDES = "*.lora_magnitude.*"
FASTER = ("*.lora_B.*", MAGNITUDES)


def build_optimizer(
    config: OptimizerConfig,
    chunks: list[torch.nn.Module],
    *,
    learning_rate: float,
    dtype: torch.dtype,
    distributed: bool,
    overlap_param_gather: bool,
    memory: MemoryConfig,
    loraplus_lr_ratio: float = 1.0,
) -> Any:
    """megatron-core's mixed-precision (or fp32, or distributed) AdamW over the trainable parameters of `chunks`.

    Matrices get `weight_decay`, biases and norms none (megatron-core's own rule), nor do DoRA's magnitudes, which are
    matrices where they are those of several experts.

    Args:
        memory: where the state is kept, and in which form.
        loraplus_lr_ratio: learning rate of the adapters' B and magnitudes over that of everything else.
    """
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=learning_rate,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        loss_scale=config.loss_scale,
        initial_loss_scale=config.initial_loss_scale,
        min_loss_scale=config.min_loss_scale,
        loss_scale_window=config.loss_scale_window,
        hysteresis=config.hysteresis,
        use_distributed_optimizer=distributed,
        overlap_param_gather=overlap_param_gather,
    )
    rule = {}
    if hasattr(megatron_optimizer, "get_standard_config_overrides"):  # since 0.16; 0.15 has the rule built in
        rule = {"config_overrides": megatron_optimizer.get_standard_config_overrides(settings)}
        rule["config_overrides"][megatron_optimizer.ParamKey(name=MAGNITUDES)] = {"wd_mult": 0.0}
        if loraplus_lr_ratio != 1.0:
            rates = {"max_lr": learning_rate * loraplus_lr_ratio, "min_lr": config.min_lr * loraplus_lr_ratio}
            rule["config_overrides"][megatron_optimizer.ParamKey(name=FASTER)] = rates
    elif loraplus_lr_ratio != 1.0:
        raise UserError(
            f"--loraplus-lr-ratio: {loraplus_lr_ratio} is wrong, because this megatron-core knows one learning rate; "
            "legal: 1; try: megatron-core 0.16"
        )
    elif any(".lora_magnitude." in name and p.dim() > 1 for chunk in chunks for name, p in chunk.named_parameters()):
        raise UserError(
            "--use-dora: experts' magnitudes would decay like weights, because this megatron-core takes no exceptions; "
            "legal: targets without experts; try: megatron-core 0.16"
        )

    def make() -> Any:
        optimizer = megatron_optimizer.get_megatron_optimizer(settings, chunks, **rule)
        for part in optimizer_parts(optimizer):
            _step_by_operator(part.optimizer, config.optimizer_selection)
        return optimizer

    if config.o2_optimizer or memory.swap_optimizer or memory.reuse_fp32_param:
        return make_in_form(make, chunks, config, memory)
    return make()


def make_in_form(
    make: Callable[[], Any], chunks: list[torch.nn.Module], config: OptimizerConfig, memory: MemoryConfig
) -> Any:
    """The optimizer that `make` makes over the parameters of `chunks`, with its state kept as the options say.

    Raises:
        UserError: the optimizer is another package's.
    """
    from mindspeed_llm.memory.optimizer_windows import StateForm, WindowedAdamW
    from mindspeed_llm.memory.store import open_store

    form = StateForm(
        moments=torch.bfloat16 if config.o2_optimizer else torch.float32,
        split=memory.reuse_fp32_param,
        store=open_store() if memory.swap_optimizer else None,
        windows=memory.swap_optimizer_times if memory.swap_optimizer else 1,
    )
    with _gradients_given_back(chunks):
        optimizer = make()
        held = [state for state in own_states(optimizer) if state.main is not None]
        for part in optimizer_parts(optimizer):
            if part.optimizer is not None and not isinstance(part.optimizer, FusedAdamW):
                given = {
                    "--o2-optimizer": config.o2_optimizer,
                    "--swap-optimizer": memory.swap_optimizer,
                    "--reuse-fp32-param": memory.reuse_fp32_param,
                }
                asked = ", ".join(flag for flag, on in given.items() if on)
                raise UserError(
                    f"--optimizer-selection: megatron-core uses {type(part.optimizer).__module__} where that is "
                    f"installed, which has no {asked}; legal: our AdamW; try: an environment without it"
                )
            if states := [state for state in held if state.part is part]:
                WindowedAdamW.rearrange(part, states, form)
    return optimizer


@contextmanager
def _gradients_given_back(chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Do without the memory of the gradients: megatron-core's fp32 weights are on the device before they leave it."""
    buffers = [buffer.grad_data for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    sizes = [data.untyped_storage().nbytes() for data in buffers]
    for data in buffers:
        data.untyped_storage().resize_(0)
    yield
    for data, size in zip(buffers, sizes, strict=True):
        data.untyped_storage().resize_(size)
        data.zero_()


def _step_by_operator(optimizer: Any, selection: str) -> None:
    """Let torch's AdamW step by the operator, whose implementation `selection` has chosen.

    Raises:
        UserError: the optimizer is another package's and not the one asked for.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        FusedAdamW.take_over(optimizer)
    elif optimizer is not None and selection != "fused_adamw":
        raise UserError(
            f"--optimizer-selection {selection}: is wrong, because megatron-core uses {type(optimizer).__module__} "
            "where that is installed; legal: fused_adamw; try: an environment without it"
        )


def warmup_samples(config: OptimizerConfig, decay_samples: int, global_batch_size: int) -> float:
    """Samples of warm-up out of `decay_samples`: a fraction may end inside an iteration, as in Megatron-LM.

    Raises:
        UserError: the warm-up is not shorter than the decay.
    """
    if config.lr_warmup_fraction is not None:
        if config.lr_warmup_fraction >= 1:
            raise UserError(
                f"--lr-warmup-fraction: {config.lr_warmup_fraction} is wrong, because it leaves nothing to decay; "
                "legal: 0 to below 1"
            )
        return config.lr_warmup_fraction * decay_samples
    warmup = config.lr_warmup_iters * global_batch_size
    if warmup >= decay_samples:
        decay_iters = decay_samples / global_batch_size
        raise UserError(
            f"schedule: {config.lr_warmup_iters} warm-up iterations do not fit into {decay_iters:g} decay iterations; "
            f"legal: at most {math.ceil(decay_iters) - 1} for --lr-warmup-iters; try: a smaller one, or more "
            "--lr-decay-iters"
        )
    return warmup


def build_scheduler(
    config: OptimizerConfig, optimizer: Any, *, learning_rate: float, train_samples: int, global_batch_size: int
) -> Any:
    """megatron-core's schedule with the numbers of Megatron-LM's `get_optimizer_param_scheduler`, all of them samples.

    Args:
        train_samples: length of the run; the decay ends there unless `lr_decay_iters` says otherwise.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    decay_samples = train_samples if config.lr_decay_iters is None else config.lr_decay_iters * global_batch_size
    wsd = None
    if config.lr_decay_style == "WSD":
        wsd_iters = config.lr_wsd_decay_iters or max(decay_samples // global_batch_size // 10, 1)
        wsd = wsd_iters * global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr_warmup_init,
        max_lr=learning_rate,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup_samples(config, decay_samples, global_batch_size),
        lr_decay_steps=decay_samples,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=train_samples,
        wd_incr_style="constant",
        wsd_decay_steps=wsd,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
