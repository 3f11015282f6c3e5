"""What does not go with `--use-torch-fsdp2`."""

from __future__ import annotations

from mindspeed_llm.config.run import RunConfig, all_options

# Option -> why it does not go with parameters that are cut over the data-parallel ranks.
NOT_WITH = {
    "use_distributed_optimizer": "optimizer state is split already, with the parameters",
    "overlap_grad_reduce": "gradients are reduced layer by layer while the backward pass runs already",
    "overlap_param_gather": "parameters are gathered layer by layer in every pass already",
    "gradient_accumulation_fusion": "gradients leave the backward pass as tensors of their own, to be reduced",
    "fp16": "its optimizer does not scale the loss (legal: --bf16, or fp32)",
    "qlora": "what is held in NF4 is not cut",
    "log_local_norms": "no rank has the whole of its own gradient at once",
    "swap_optimizer": "optimizer state is split over the ranks instead",
    "o2_optimizer": "moments of parameters that are cut are fp32",
    "reuse_fp32_param": "there is no second copy of a weight: fp32 values are rounded when they are gathered",
}


def fully_sharded_problems(config: RunConfig) -> list[str]:
    """A line for each option that is refused."""
    p = config.parallel
    if not p.use_torch_fsdp2:
        if p.torch_fsdp2_reshard_after_forward:
            return []
        return ["--torch-fsdp2-no-reshard-after-forward has a meaning with --use-torch-fsdp2 only"]
    flags = {name: option.flags[0] for name, option in all_options().items()}
    problems = [
        f"{flags[name]} does not go with --use-torch-fsdp2: {why}; leave out one of the two"
        for name, why in NOT_WITH.items()
        if config.get(name)
    ]
    tp = p.tensor_model_parallel_size
    sizes = {"pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1, "expert_tensor_parallel_size": tp}
    for name, legal in sizes.items():
        if config.get(name) not in (None, legal):
            problems.append(
                f"{flags[name]}: {config.get(name)} is wrong with --use-torch-fsdp2, which cuts all layers and experts "
                f"of a model over the same ranks; legal: {legal}; try: --use-distributed-optimizer"
            )
    return problems
