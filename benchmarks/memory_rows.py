"""What benchmarks/memory.py measures: settings, each with a plain training, and what is switched on beside it."""

from __future__ import annotations

from typing import NamedTuple

SWAP_ALL = "--swap-attention --swap-modules input_norm,self_attention,post_attention_norm,mlp --swap-budget 64"
CHEAP = "--recompute-norm --recompute-activation-function"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
LORA = "--lora-r 16 --lora-target-modules all-linear"
TENSOR = "--tensor-model-parallel-size 2"
EXPERT = "--expert-model-parallel-size 2"


class Setting(NamedTuple):
    """Model and processes of some rows.

    Args:
        model: of MODELS.
        flags: that all rows have.
        ranks: processes.
        data_parallel: of these, so many share the sequences of a step.
    """

    model: str
    flags: str = ""
    ranks: int = 1
    data_parallel: int = 1


class Row(NamedTuple):
    """One training.

    Args:
        setting: of SETTINGS.
        flags: beyond the setting's.
        beside: the row that it is compared with; none for the plain ones.
    """

    setting: str
    flags: str
    beside: str = ""


# Memory of tokens in proportion to that of weights as in an 8B model with some 16 thousand tokens on 8 devices.
WIDE = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 4}
WIDE |= {"head_dim": 64, "vocab_size": 16000, "initializer_range": 0.02}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"head_dim": 16, "vocab_size": 1000}
NUM_EXPERTS, TOPK = 8, 2

SETTINGS = {
    "one process": Setting("llama"),
    "one process, adapters": Setting("llama", LORA),
    "one process, experts": Setting("mixtral"),
    "two data-parallel ranks": Setting("llama", "", 2, 2),
    "two tensor-parallel ranks": Setting("llama", TENSOR, 2),
    "two expert-parallel ranks": Setting("qwen2_moe", EXPERT, 2, 2),
}
_PLAIN, _ADAPTERS, _EXPERTS, _DATA, _TENSOR, _EXPERT = SETTINGS
_SEQUENCE = "--sequence-parallel"
_SHARED = "--use-distributed-optimizer"

ROWS = {
    "pre-training": Row(_PLAIN, ""),
    "loss from all logits": Row(_PLAIN, "--no-cross-entropy-loss-fusion", "pre-training"),
    "loss in chunks": Row(_PLAIN, "--loss-compute-mode chunk --loss-chunk-size 256", "pre-training"),
    "recompute norms": Row(_PLAIN, "--recompute-norm", "pre-training"),
    "recompute activations": Row(_PLAIN, "--recompute-activation-function", "pre-training"),
    "recompute both": Row(_PLAIN, CHEAP, "pre-training"),
    "recompute layers": Row(_PLAIN, FULL, "pre-training"),
    "swap": Row(_PLAIN, SWAP_ALL, "pre-training"),
    "swap, recompute both": Row(_PLAIN, f"{SWAP_ALL} {CHEAP}", "pre-training"),
    "recompute layers, swap inputs": Row(_PLAIN, f"{FULL} --swap-layer-input --swap-budget 64", "pre-training"),
    "moments in bf16": Row(_PLAIN, "--o2-optimizer", "pre-training"),
    "weights are halves of masters": Row(_PLAIN, "--reuse-fp32-param", "pre-training"),
    "swap optimizer": Row(_PLAIN, "--swap-optimizer", "pre-training"),
    "LoRA": Row(_ADAPTERS, "", "pre-training"),
    "LoRA, swap": Row(_ADAPTERS, SWAP_ALL, "LoRA"),
    "QLoRA": Row(_ADAPTERS, "--qlora", "LoRA"),
    "experts": Row(_EXPERTS, ""),
    "experts, recompute activations": Row(_EXPERTS, "--recompute-activation-function", "experts"),
    "experts, recompute them (level0)": Row(_EXPERTS, "--moe-zero-memory level0", "experts"),
    "experts, recompute the part (level1)": Row(_EXPERTS, "--moe-zero-memory level1", "experts"),
    "experts, swap": Row(_EXPERTS, SWAP_ALL, "experts"),
    "data parallel": Row(_DATA, ""),
    "overlapped reduction": Row(_DATA, "--overlap-grad-reduce", "data parallel"),
    "distributed optimizer": Row(_DATA, _SHARED, "data parallel"),
    "distributed optimizer, overlapped": Row(
        _DATA, f"{_SHARED} --overlap-grad-reduce --overlap-param-gather", "distributed optimizer"
    ),
    "FSDP2": Row(_DATA, "--use-torch-fsdp2", "data parallel"),
    "tensor parallel": Row(_TENSOR, ""),
    "sequence parallel": Row(_TENSOR, _SEQUENCE, "tensor parallel"),
    "sequence parallel, products in parts": Row(
        _TENSOR, f"{_SEQUENCE} --use-ascend-coc --coc-parallel-num 2", "sequence parallel"
    ),
    "sequence parallel, swap": Row(_TENSOR, f"{_SEQUENCE} {SWAP_ALL}", "sequence parallel"),
    "expert parallel": Row(_EXPERT, ""),
    "shared experts overlapped": Row(_EXPERT, "--moe-shared-expert-overlap", "expert parallel"),
    "all experts overlapped": Row(_EXPERT, "--moe-alltoall-overlap-comm", "expert parallel"),
    "expert parallel, level1": Row(_EXPERT, "--moe-zero-memory level1", "expert parallel"),
}
# Rows that never have all logits, and how many they may have.
CHUNKED = {"loss in chunks": 256}


def models(layers: int, sequence: int, quick: bool) -> dict[str, dict[str, int | float]]:
    """Type of model -> fields of its config.json; those with experts have half as many layers, of eight MLPs each."""
    sizes: dict[str, int | float] = {**(TINY if quick else WIDE), "max_position_embeddings": sequence}
    few = sizes | {"num_hidden_layers": max(layers // 2, 2), "num_experts_per_tok": TOPK}
    width = sizes["intermediate_size"]
    shared = {"num_experts": NUM_EXPERTS, "moe_intermediate_size": width, "shared_expert_intermediate_size": width}
    return {
        "llama": sizes | {"num_hidden_layers": layers},
        "mixtral": few | {"num_local_experts": NUM_EXPERTS},
        "qwen2_moe": few | shared,
    }
