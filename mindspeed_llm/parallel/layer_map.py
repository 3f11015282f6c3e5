"""Which layers live where: the one function from (layers, pipeline, virtual pipeline, list, no-ops) to stages.

Building, conversion, loading and export all ask here, so they cannot disagree. Free of torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed_llm.config.parallel import ParallelConfig, numbers
from mindspeed_llm.errors import UserError

Chunk = tuple[int | None, ...]


@dataclass(frozen=True)
class LayerMap:
    """A partition of the layers 0..num_layers-1 over pipeline stages.

    Args:
        chunks: [pp][vpp][slot] -> global layer index, or None where the slot holds a no-op layer. The position of a
            slot in its chunk is the layer's number in Megatron's files (`decoder.layers.<slot>`). A model built here
            has no module for a no-op layer and numbers the others without gaps.
    """

    num_layers: int
    chunks: tuple[tuple[Chunk, ...], ...]

    @property
    def pp(self) -> int:
        """Number of pipeline stages."""
        return len(self.chunks)

    @property
    def vpp(self) -> int:
        """Model chunks per stage; 1 without virtual pipeline."""
        return len(self.chunks[0])

    @property
    def num_slots(self) -> int:
        """Layers counted with the no-op ones: what Megatron's `--num-layers` says when `--noop-layers` is used."""
        return sum(len(chunk) for stage in self.chunks for chunk in stage)

    @property
    def noop_layers(self) -> tuple[int, ...]:
        """Slot numbers that hold no-op layers, counted over the whole model in forward order."""
        slots = [layer for v in range(self.vpp) for p in range(self.pp) for layer in self.chunks[p][v]]
        return tuple(i for i, layer in enumerate(slots) if layer is None)

    def chunk(self, pp_rank: int, vpp_rank: int = 0) -> Chunk:
        """The slots of one model chunk."""
        return self.chunks[pp_rank][vpp_rank]

    def layers(self, pp_rank: int, vpp_rank: int = 0) -> dict[int, int]:
        """slot -> global layer index of one model chunk, no-op slots left out."""
        return {local: layer for local, layer in enumerate(self.chunk(pp_rank, vpp_rank)) if layer is not None}

    def built_layers(self, pp_rank: int, vpp_rank: int = 0) -> tuple[int, ...]:
        """Global indices of the layers that one model chunk is built of, in order."""
        return tuple(self.layers(pp_rank, vpp_rank).values())

    @property
    def built_sizes(self) -> tuple[int, ...]:
        """Layers that each model chunk is built of, chunks in forward order."""
        return tuple(len(self.built_layers(p, v)) for v in range(self.vpp) for p in range(self.pp))

    def place(self, layer: int) -> tuple[int, int, int]:
        """(pp_rank, vpp_rank, local index) of a global layer index."""
        for p, stage in enumerate(self.chunks):
            for v, chunk in enumerate(stage):
                if layer in chunk:
                    return p, v, chunk.index(layer)
        raise IndexError(f"layer {layer} is not in 0..{self.num_layers - 1}")

    def is_first(self, pp_rank: int, vpp_rank: int = 0) -> bool:
        """Whether the chunk starts the network (holds the embedding)."""
        return pp_rank == 0 and vpp_rank == 0

    def is_last(self, pp_rank: int, vpp_rank: int = 0) -> bool:
        """Whether the chunk ends the network (holds the final norm and the output layer)."""
        return pp_rank == self.pp - 1 and vpp_rank == self.vpp - 1


def layer_map(
    num_layers: int,
    pp: int = 1,
    vpp: int | None = None,
    layer_list: Sequence[int] | None = None,
    noop_layers: Iterable[int] | None = None,
    embedding_as_layer: bool = False,
    loss_as_layer: bool = False,
) -> LayerMap:
    """Distribute the layers over the pipeline.

    Args:
        num_layers: layers with weights; no-op layers are not counted.
        pp: pipeline stages.
        vpp: model chunks per stage (interleaved schedule); None or 1 for none. Chunk v of stage p holds the slots
            [(v*pp + p)*k, (v*pp + p + 1)*k), as Megatron orders them.
        layer_list: layers per stage for an uneven split; not together with vpp or noop_layers.
        noop_layers: positions, among num_layers + len(noop_layers) slots, that hold identity layers, so that an
            awkward number of layers still divides evenly.
        embedding_as_layer, loss_as_layer: count the embedding before the first layer, the output layer behind the
            last one, as a layer in an even split; the first (last) chunk then has one layer less, maybe none.

    Raises:
        UserError: the arguments give no partition; the message suggests a legal one.
    """
    chunks_per_stage = 1 if vpp is None else vpp
    noops = sorted(noop_layers or ())
    ends = (embedding_as_layer, loss_as_layer)
    _check_counts(num_layers, pp, chunks_per_stage, noops, sum(ends))
    if layer_list is not None:
        sizes = _listed_sizes(num_layers, pp, chunks_per_stage, layer_list, noops, any(ends))
    else:
        sizes = _even_sizes(num_layers, pp, chunks_per_stage, len(noops), ends)
    layers = iter(range(num_layers))
    noop_set = set(noops)
    slots = [None if slot in noop_set else next(layers) for slot in range(num_layers + len(noops))]
    pieces, start = [], 0
    for size in sizes:
        pieces.append(tuple(slots[start : start + size]))
        start += size
    stages = tuple(tuple(pieces[v * pp + p] for v in range(chunks_per_stage)) for p in range(pp))
    return LayerMap(num_layers, stages)


def layers_of_options(options: ParallelConfig, num_layers: int, pp: int) -> LayerMap:
    """The layer map that the options of a door describe for a model of `num_layers` layers over `pp` stages.

    Raises:
        UserError: they give no partition.
    """
    return layer_map(num_layers, pp, **split_of_options(options, num_layers, pp))


def split_of_options(options: ParallelConfig, num_layers: int, pp: int) -> dict[str, Any]:
    """The keyword arguments of `layer_map` that the options of a door describe.

    Raises:
        UserError: the layers do not divide into chunks of the asked size.
    """
    noops = numbers(options.noop_layers)
    ends = (options.account_for_embedding_in_pipeline_split, options.account_for_loss_in_pipeline_split)
    chunks = options.num_virtual_stages_per_pipeline_rank
    per_chunk = options.num_layers_per_virtual_pipeline_stage
    if chunks is not None and per_chunk is not None:
        raise UserError(
            "--num-virtual-stages-per-pipeline-rank and --num-layers-per-virtual-pipeline-stage exclude each other; "
            "give one"
        )
    if per_chunk is not None:
        chunks = chunks_per_stage(num_layers + sum(ends), pp, per_chunk, len(noops or ()))
    return {
        "vpp": chunks,
        "layer_list": numbers(options.num_layer_list),
        "noop_layers": noops,
        "embedding_as_layer": ends[0],
        "loss_as_layer": ends[1],
    }


def chunks_per_stage(num_layers: int, pp: int, layers_per_chunk: int, num_noops: int = 0) -> int:
    """Model chunks per stage from `--num-layers-per-virtual-pipeline-stage`, no-op layers counted.

    Raises:
        UserError: the layers do not divide.
    """
    layers = num_layers + num_noops
    if layers % (pp * layers_per_chunk):
        legal = [str(n) for n in range(1, layers + 1) if layers % (pp * n) == 0]
        counted = f"{layers} layers" + (f" ({num_noops} of them no-op)" if num_noops else "")
        raise UserError(
            f"--num-layers-per-virtual-pipeline-stage: {layers_per_chunk} x {pp} stages does not divide {counted}; "
            f"legal: {', '.join(legal) or 'none with these stages'}"
        )
    return layers // (pp * layers_per_chunk)


def even_split(num_layers: int, pp: int) -> tuple[int, ...]:
    """The most balanced legal `--num-layer-list`: longer stages first (the last stage also holds the output layer)."""
    base, rest = divmod(num_layers, pp)
    return tuple(base + (stage < rest) for stage in range(pp))


def _check_counts(num_layers: int, pp: int, vpp: int, noops: Sequence[int], ends: int) -> None:
    for what, value in (("num-layers", num_layers), ("pipeline-parallel-size", pp), ("virtual chunks", vpp)):
        if value < 1:
            raise UserError(f"pipeline: {what} is {value}; legal: a positive number")
    if ends and pp == 1:
        raise UserError(
            "pipeline: --account-for-embedding-in-pipeline-split and --account-for-loss-in-pipeline-split need "
            "pipeline-parallel-size > 1; try: leave them out"
        )
    if pp > num_layers + ends:
        raise UserError(
            f"pipeline: pipeline-parallel-size={pp} exceeds the {num_layers} layers, so a stage would be empty; "
            f"legal: 1..{num_layers}"
        )
    if vpp > 1 and pp == 1:
        raise UserError("pipeline: virtual pipeline needs pipeline-parallel-size > 1; try: leave it out")
    total = num_layers + len(noops)
    if len(set(noops)) != len(noops) or any(not 0 <= slot < total for slot in noops):
        raise UserError(
            f"pipeline: --noop-layers {','.join(map(str, noops))} is wrong, because they are positions among the "
            f"{num_layers} + {len(noops)} slots; legal: distinct numbers in 0..{total - 1}"
        )


def _listed_sizes(
    num_layers: int, pp: int, vpp: int, layer_list: Sequence[int], noops: Sequence[int], ends: bool
) -> list[int]:
    shown = ",".join(map(str, layer_list))
    if vpp > 1 or noops or ends:
        other = (
            "virtual pipeline"
            if vpp > 1
            else "--noop-layers"
            if noops
            else "--account-for-embedding/loss-in-pipeline-split"
        )
        raise UserError(f"pipeline: --num-layer-list {shown} cannot be combined with {other}; try: drop one of them")
    if len(layer_list) != pp or sum(layer_list) != num_layers or min(layer_list) < 1:
        raise UserError(
            f"pipeline: --num-layer-list {shown} is wrong, because {num_layers} layers over {pp} stages need {pp} "
            f"positive numbers that sum to {num_layers}; try: {','.join(map(str, even_split(num_layers, pp)))}"
        )
    return list(layer_list)


def _even_sizes(num_layers: int, pp: int, vpp: int, num_noops: int, ends: tuple[bool, bool]) -> list[int]:
    total, pieces = num_layers + num_noops + sum(ends), pp * vpp
    if total % pieces == 0:
        sizes = [total // pieces] * pieces
        sizes[0] -= ends[0]
        sizes[-1] -= ends[1]
        return sizes
    counted = f"{num_layers} layers" + (f" + {num_noops} no-op layers" if num_noops else "")
    counted += f" + {' and '.join(n for n, on in zip(('embedding', 'loss'), ends) if on)}" if any(ends) else ""
    legal = ", ".join(str(n) for n in range(1, num_layers + 1) if total % (n * vpp) == 0)
    if vpp > 1:
        chunk_counts = [n for n in range(1, num_layers + 1) if total % (pp * n) == 0]
        fewer = f"; virtual chunks that fit: {', '.join(map(str, chunk_counts))}" if chunk_counts else ""
        raise UserError(
            f"pipeline: {counted} over {pp} stages x {vpp} virtual chunks is uneven; legal pipeline-parallel-size "
            f"with {vpp} chunks: {legal or 'none'}{fewer}"
        )
    raise UserError(
        f"pipeline: {counted} over {pp} stages is uneven; legal pipeline-parallel-size: {legal}; try: "
        f"--num-layer-list {','.join(map(str, even_split(num_layers, pp)))} (any list of {pp} numbers that sums to "
        f"{num_layers})"
    )
