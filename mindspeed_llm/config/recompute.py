"""Options of recomputation: what the backward pass computes once more instead of the forward pass keeping it."""

from __future__ import annotations

from mindspeed_llm.config.schema import at_least, option, section

MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe_act", "moe", "shared_experts")


@section
class RecomputeConfig:
    """All of it leaves every number as it is. Layers are counted in each pipeline chunk, behind those that
    `--recompute-granularity full --recompute-method block` recomputes as a whole."""

    recompute_granularity: str | None = option(
        help="recompute activations in the backward pass instead of keeping them",
        level="advanced",
        choices=("full", "selective"),
    )
    recompute_method: str | None = option(
        help="with full: uniform chunks, or the first layers of a stage",
        level="advanced",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int | None = option(
        help="layers per chunk (uniform) or recomputed layers (block)",
        level="advanced",
        check=at_least(1),
    )
    recompute_modules: list[str] | None = option(
        help="with selective: which parts of every layer; default: core_attn",
        level="advanced",
        choices=MODULES,
    )
    enable_recompute_layers_per_pp_rank: bool = option(
        help="numbers of layers are those of a pipeline rank, its first chunk's first, not of each of its chunks",
        level="expert",
    )
    recompute_activation_function: bool = option(
        help="drop what the MLP's (and experts') activation function returns; recompute it for the second linear",
        level="advanced",
    )
    recompute_activation_function_num_layers: int | None = option(
        help="in so many layers; default: in all", level="advanced", check=at_least(1)
    )
    recompute_norm: bool = option(
        help="drop what the norms before attention and MLP return; recompute it for the linear behind",
        level="advanced",
    )
    recompute_norm_num_layers: int | None = option(
        help="in so many layers; default: in all", level="advanced", check=at_least(1)
    )
    moe_zero_memory: str = option(
        "disable",
        help="level0: experts keep the tokens sent to them alone; level1: a layer's expert part keeps its input alone "
        "and sends tokens twice",
        level="advanced",
        choices=("disable", "level0", "level1"),
    )
    moe_zero_memory_num_layers: int | None = option(
        help="in so many layers; default: in all", level="advanced", check=at_least(1)
    )
    mla_zero_memory: bool = option(
        help="latent attention keeps its input instead of queries, keys, values and latents",
        level="advanced",
    )
    recompute_mla_up_proj: bool = option(
        help="latent attention keeps latents instead of queries, keys and values", level="advanced"
    )
