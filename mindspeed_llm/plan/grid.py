"""The grid of ranks as a picture for the terminal: which rank is where, and which layers and experts it holds."""

from __future__ import annotations

from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.layer_map import Chunk
from mindspeed_llm.parallel.layout import ParallelLayout

# Wider and longer grids are folded in the middle.
MOST_COLUMNS, MOST_STAGES = 6, 12
# Width kept for what a stage holds, when the table is too wide.
LAYERS_WIDTH = 36
GAP = "..."


def fold(count: int, most: int) -> list[int | None]:
    """The numbers 0..count-1, or so many that `most` entries suffice: the first ones, None for a gap, and the last."""
    if count <= most:
        return list(range(count))
    return [*range(most - 2), None, count - 1]


def rank_at(layout: ParallelLayout, pp: int, dp: int, cp: int, tp: int) -> int:
    """The rank at these coordinates of the dense layers: the inverse of `ParallelLayout.coordinates`."""
    return ((pp * layout.dp + dp) * layout.cp + cp) * layout.tp + tp


def expert_rank_at(layout: ParallelLayout, pp: int, edp: int, ep: int, etp: int) -> int:
    """The rank at these coordinates of the experts."""
    return ((pp * layout.edp + edp) * layout.ep + ep) * layout.expert_tp + etp


def ranges(numbers: list[int]) -> str:
    """Numbers in short: [0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def stage_text(layout: ParallelLayout, stage: int, shape: ModelShape | None = None) -> str:
    """What a stage holds, a part for each of its model chunks, e.g. "embedding, 0-3 | 8-11"."""
    return " | ".join(
        _chunk_text(layout, stage, number, chunk, shape) for number, chunk in enumerate(layout.layers.chunks[stage])
    )


def _chunk_text(layout: ParallelLayout, stage: int, number: int, chunk: Chunk, shape: ModelShape | None) -> str:
    parts = ["embedding"] if layout.layers.is_first(stage, number) else []
    layers = [layer for layer in chunk if layer is not None]
    parts += [ranges(layers)] if layers else []
    noops = len(chunk) - len(layers)
    parts += [f"{noops} no-op"] if noops else []
    if layout.layers.is_last(stage, number):
        parts += [f"{shape.mtp_num_layers} multi-token"] if shape is not None and shape.mtp_num_layers else []
        parts += ["head"]
    return ", ".join(parts)


def grid_rows(layout: ParallelLayout, shape: ModelShape | None = None) -> list[list[str]]:
    """The picture of the dense layers: a header, then a row for each stage with the ranks of each replica.

    A column is one pair (data, context); its cell lists the tensor-parallel ranks.
    """
    columns = fold(layout.dp * layout.cp, MOST_COLUMNS)
    header = ["stage", "layers"] + [_column_name(layout, column) for column in columns]
    rows = [header]
    for stage in fold(layout.pp, MOST_STAGES):
        if stage is None:
            rows.append([GAP] * len(header))
            continue
        cells = [
            GAP
            if column is None
            else ranges([rank_at(layout, stage, *divmod(column, layout.cp), tp) for tp in range(layout.tp)])
            for column in columns
        ]
        rows.append([str(stage), stage_text(layout, stage, shape), *cells])
    return rows


def _column_name(layout: ParallelLayout, column: int | None) -> str:
    if column is None:
        return GAP
    dp, cp = divmod(column, layout.cp)
    return f"data {dp}" + (f" context {cp}" if layout.cp > 1 else "")


def expert_rows(layout: ParallelLayout, shape: ModelShape) -> list[list[str]]:
    """The picture of the experts: a row for each expert-parallel group of a stage's experts, a column per replica."""
    replicas = fold(layout.edp, MOST_COLUMNS)
    rows = [["stage", "experts"] + [GAP if edp is None else f"replica {edp}" for edp in replicas]]
    share = shape.num_moe_experts // layout.ep
    for stage in fold(layout.pp, 3):
        for ep in fold(layout.ep, MOST_COLUMNS):
            if stage is None or ep is None:
                rows.append([GAP if stage is None else str(stage), *[GAP] * (len(replicas) + 1)])
                if stage is None:
                    break
                continue
            cells = [
                GAP
                if edp is None
                else ranges([expert_rank_at(layout, stage, edp, ep, etp) for etp in range(layout.expert_tp)])
                for edp in replicas
            ]
            rows.append([str(stage), ranges(list(range(ep * share, (ep + 1) * share))), *cells])
    return rows


def grid_tables(layout: ParallelLayout, shape: ModelShape) -> list:
    """The pictures as rich tables."""
    sizes = " x ".join(
        f"{name} {size}"
        for name, size in (("pipeline", layout.pp), ("data", layout.dp), ("context", layout.cp), ("tensor", layout.tp))
        if size > 1 or name == "data"
    )
    chunks = f", {layout.vpp} chunks per stage" if layout.vpp else ""
    tables = [_table(f"ranks: {layout.world_size} = {sizes}{chunks}", grid_rows(layout, shape))]
    if shape.num_moe_experts and layout.ep > 1:
        title = f"experts: replicas {layout.edp} x parallel {layout.ep} x tensor {layout.expert_tp}"
        tables.append(_table(title, expert_rows(layout, shape)))
    return tables


def _table(title: str, rows: list[list[str]]):
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(rows[0]):
        width = min(max(len(row[number]) for row in rows), LAYERS_WIDTH) if number == 1 else None
        table.add_column(name, overflow="fold", min_width=width, justify="left" if number == 1 else "right")
    for row in rows[1:]:
        table.add_row(*row)
    return table
