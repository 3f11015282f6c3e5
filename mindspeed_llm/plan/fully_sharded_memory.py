"""What `--use-torch-fsdp2` does to the memory of a device."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from mindspeed_llm.checkpoint.names import EMBEDDING
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.models.tensor_names import layer_index
from mindspeed_llm.parallel.layout import ParallelLayout
from mindspeed_llm.plan.memory import (
    GRADIENT_BYTES,
    MASTER_BYTES,
    MOMENT_BYTES,
    MemoryEstimate,
    local_sizes,
)
from mindspeed_llm.plan.trained import TrainedParts


def sharded_memory(
    whole: MemoryEstimate,
    shape: ModelShape,
    layout: ParallelLayout,
    *,
    padded_vocab: int,
    dtype_bytes: int,
    adapter_parameters: int,
    trained: TrainedParts,
    reshard_after_forward: bool,
) -> MemoryEstimate:
    """The estimate with everything cut over the ranks that see other tokens, and what of it is gathered at the peak.

    The peak is in the backward pass of a layer: its weights are gathered and so are those of the next one to come, its
    gradients exist in the type of the products and in fp32, to be summed; what is outside of layers, but for an
    embedding of its own, is gathered for the whole pass.

    Args:
        whole: as if nothing were cut.
        adapter_parameters: beside the model's own.
        trained: what is trained of the model itself.
    """
    by_layer: Counter[int | None] = Counter()
    learning: Counter[int | None] = Counter()
    embedding = 0
    for name, _, size in local_sizes(shape, layout, padded_vocab):
        by_layer[layer_index(name)] += size
        learning[layer_index(name)] += size if trained.has_tensor(name) else 0
        embedding += size if name == EMBEDDING and not shape.tie_word_embeddings else 0
    ranks, total = layout.dp * layout.cp, by_layer.total()
    layers = [by_layer[number] for number in range(shape.num_layers)]
    outside = total - sum(layers) - embedding
    gradients = max(learning[number] for number in range(shape.num_layers)) * (dtype_bytes + GRADIENT_BYTES)
    stepped = learning.total() + adapter_parameters // layout.tp
    frozen = total - learning.total()
    gathered = sum(layers) if not reshard_after_forward else sum(sorted(layers)[-2:])
    return replace(
        whole,
        weights=(stepped * MASTER_BYTES + frozen * dtype_bytes) // ranks,
        gradients=stepped * GRADIENT_BYTES // ranks,
        optimizer=stepped * MOMENT_BYTES // ranks,
        temporary=whole.temporary + (gathered + outside) * dtype_bytes + gradients,
    )
