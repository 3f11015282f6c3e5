"""Options that choose operator implementations. Each defaults to the best one available on the device."""

from __future__ import annotations

from mindspeed_llm.config.schema import TRAINING_DOORS, at_least, option, section

CHUNK_NUMBERS = (1, 2, 4, 8)

# MindSpeed's default of --loss-chunk-size.
LOSS_CHUNK_ROWS = 1024


def _is_chunk_number(value: int) -> str | None:
    return None if value in CHUNK_NUMBERS else f"legal: {', '.join(map(str, CHUNK_NUMBERS))}"


@section
class OperatorConfig:
    """On is the fused form of an operator; `--no-...` selects the plain torch reference it is tested against."""

    use_flash_attn: bool = option(True, help="attention without a materialised score matrix", level="advanced")
    use_fused_rmsnorm: bool = option(
        True, help="norm as one operator, after attention with the sum it normalises", level="advanced"
    )
    use_fused_swiglu: bool = option(True, help="gate of an MLP as one operator", level="advanced")
    use_fused_rotary_pos_emb: bool = option(True, help="rotary embedding as one operator", level="advanced")
    compile_operators: bool = option(
        help="norms, gates, rotary embedding and NF4 as kernels compiled for this CPU, which takes some seconds when a "
        "run begins; needs a C++ compiler",
        level="advanced",
        doors=TRAINING_DOORS,
    )
    gradient_accumulation_fusion: bool = option(
        help="add weight gradients to their fp32 sums inside the matrix product",
        level="expert",
        doors=TRAINING_DOORS,
    )
    use_ascend_coc: bool = option(
        help="with sequence parallelism, multiply one part of the sequence while another is sent (on every device)",
        level="expert",
        doors=TRAINING_DOORS,
    )
    coc_parallel_num: int = option(
        1,
        help="into how many parts --use-ascend-coc cuts a rank's tokens",
        check=_is_chunk_number,
        level="expert",
        doors=TRAINING_DOORS,
    )
    use_ascend_mc2: bool = option(
        help="with sequence parallelism, send and multiply in one kernel of the NPU",
        level="expert",
        doors=TRAINING_DOORS,
        also=("--use-mc2",),
    )
    cross_entropy_loss_fusion: bool = option(
        True,
        help="loss straight from hidden states, a chunk of logits at a time; without, all logits exist",
        level="advanced",
        doors=TRAINING_DOORS,
    )
    loss_compute_mode: str = option(
        "default",
        help="which logits exist at once in the loss: as many as memory allows (default), or those of "
        "--loss-chunk-size labelled tokens (chunk)",
        choices=("default", "chunk"),
        level="advanced",
        doors=TRAINING_DOORS,
    )
    loss_chunk_size: int | None = option(
        help="labelled tokens whose logits exist at once in the loss; default: by memory, 1024 with "
        "--loss-compute-mode chunk",
        level="expert",
        check=at_least(1),
        doors=TRAINING_DOORS,
    )


def loss_chunk_rows(options: OperatorConfig) -> int | None:
    """Labelled tokens whose logits exist at once in the loss; None for as many as memory allows."""
    if options.loss_chunk_size is None and options.loss_compute_mode == "chunk":
        return LOSS_CHUNK_ROWS
    return options.loss_chunk_size
