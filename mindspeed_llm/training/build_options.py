"""From a plan to the builder's options."""

from __future__ import annotations

from typing import Any

import torch

from mindspeed_llm.config.operators import OperatorConfig, loss_chunk_rows
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.plan.recompute import megatron_modules, recompute_options

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_options(plan: Plan, *, initialize: bool) -> Any:
    """The builder's view of the plan."""
    from mindspeed_llm.models.build import BuildOptions

    c = plan.config
    return BuildOptions(
        tensor_parallel_size=plan.tensor_parallel_size,
        pipeline_parallel_size=plan.pipeline_parallel_size,
        virtual_pipeline_parallel_size=plan.layout.vpp,
        layers=plan.layout.layers,
        context_parallel_size=plan.layout.cp,
        ulysses_size=plan.layout.ulysses,
        ring_window=plan.layout.ring_window,
        expert_parallel_size=plan.layout.ep,
        expert_tensor_parallel_size=plan.layout.etp,
        sequence_parallel=plan.sequence_parallel,
        params_dtype=DTYPES[plan.dtype_name],
        padded_vocab_size=plan.padded_vocab_size,
        hidden_dropout=c.model.hidden_dropout,
        attention_dropout=c.model.attention_dropout,
        recompute_granularity=c.recompute.recompute_granularity,
        recompute_method=c.recompute.recompute_method,
        recompute_num_layers=c.recompute.recompute_num_layers,
        recompute_modules=megatron_modules(c.recompute),
        recompute=recompute_options(c.recompute),
        mtp_loss_scaling_factor=c.training.mtp_loss_scaling_factor,
        loss_chunk_size=loss_chunk_rows(c.operators),
        gradient_accumulation_fusion=c.operators.gradient_accumulation_fusion,
        communication_chunks=communication_chunks(c.operators),
        quantized_linears=plan.holds_nf4,
        experts=expert_options(plan),
        variable_seq_lengths=plan.pipeline_parallel_size > 1,
        on_host=is_built_on_host(plan),
        seed=c.data.seed,
        initialize=initialize,
    )


def is_built_on_host(plan: Plan) -> bool:
    """Whether a device gets its share of the model alone, and the whole is made in host memory.

    Magnitudes of DoRA come from norms that tensor-parallel ranks add up, on their devices.
    """
    cut = plan.tensor_parallel_size > 1 or plan.layout.expert_tp > 1
    summed = plan.adapters is not None and plan.adapters.use_dora and cut
    return plan.config.parallel.use_torch_fsdp2 and not summed


def communication_chunks(operators: OperatorConfig) -> int | None:
    """Chunks in which linears overlap sending with multiplying; None where megatron-core's own are to be used."""
    if operators.use_ascend_coc or operators.use_ascend_mc2:
        return operators.coc_parallel_num
    return None


def expert_options(plan: Plan) -> Any:
    """How experts are computed and balanced, from the options of the same names."""
    from mindspeed_llm.models.moe.options import ExpertOptions

    e = plan.config.experts
    return ExpertOptions(
        token_dispatcher_type=e.moe_token_dispatcher_type,
        grouped_gemm=e.moe_grouped_gemm,
        permute_fusion=e.moe_permute_fusion,
        router_dtype=e.moe_router_dtype,
        router_load_balancing_type=tuple(e.moe_router_load_balancing_type),
        aux_loss_coeff=tuple(e.moe_aux_loss_coeff),
        z_loss_coeff=e.moe_z_loss_coeff,
        router_bias_update_rate=e.moe_router_bias_update_rate,
        expert_capacity_factor=e.moe_expert_capacity_factor,
        pad_expert_input_to_capacity=e.moe_pad_expert_input_to_capacity,
        token_drop_policy=e.moe_token_drop_policy,
        overlap="parts" if e.moe_alltoall_overlap_comm else "shared" if e.moe_shared_expert_overlap else "",
    )
