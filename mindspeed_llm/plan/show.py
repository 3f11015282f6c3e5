"""The plan as tables: what `--dry-run` prints."""

from __future__ import annotations

from pathlib import Path

from mindspeed_llm.checkpoint.space import bytes_of_parameter, free_bytes, in_units
from mindspeed_llm.config.memory import MemoryConfig, swap_budget_bytes, swapped_modules, swapped_parts
from mindspeed_llm.config.operators import loss_chunk_rows
from mindspeed_llm.data.blend import WeightedPath, parse_data_path
from mindspeed_llm.data.record import find_dataset, read_record
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.adapters import (
    adapted_dense_tensors,
    adapted_linears,
    adapter_parameters,
    local_adapter_parameters,
)
from mindspeed_llm.plan.fully_sharded_memory import sharded_memory
from mindspeed_llm.plan.grid import grid_tables
from mindspeed_llm.plan.memory import MemoryEstimate, Swapping, count_parameters, estimate_stages
from mindspeed_llm.plan.optimizer_memory import OptimizerForm
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.plan.recompute import recompute_modules, recompute_options, whole_layers
from mindspeed_llm.plan.trained import head_name
from mindspeed_llm.plan.weights import not_there_yet

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def plan_memory(plan: Plan) -> MemoryEstimate:
    """The memory estimate of a training plan: of its fullest stage."""
    return max(stages_memory(plan), key=lambda stage: stage.total)


def stages_memory(plan: Plan) -> list[MemoryEstimate]:
    """The memory estimate of every pipeline stage of a training plan."""
    t, o = plan.config.training, plan.config.operators
    stages = estimate_stages(
        plan.shape,
        plan.layout,
        padded_vocab=plan.padded_vocab_size,
        dtype_bytes=DTYPE_BYTES[plan.dtype_name],
        adapter_parameters=0 if plan.adapters is None else _adapters_of_all_ranks(plan),
        tokens_per_microbatch=t.micro_batch_size * plan.seq_length,
        micro_batches=plan.num_micro_batches,
        sequence_parallel=plan.sequence_parallel,
        distributed_optimizer=plan.config.parallel.use_distributed_optimizer,
        recompute=plan.config.recompute.recompute_granularity,
        loss_chunk=(loss_chunk_rows(o) or _loss_chunk(plan)) if o.cross_entropy_loss_fusion else None,
        whole_layers=whole_layers(plan.config.recompute),
        quantized=plan.holds_nf4,
        score_bytes=_score_bytes(plan),
        adapted=plan.adapters,
        trained=plan.trained,
        mask_bytes=_dropout_mask_bytes(plan),
        swapping=_swapping(plan.config.memory),
        dropping=recompute_options(plan.config.recompute),
        optimizer=OptimizerForm.of(plan.config.optimizer, plan.config.memory),
        prepacked=adapted_dense_tensors(plan.shape, plan.adapters) if plan.config.lora.lora_prepack else (),
    )
    if not plan.config.parallel.use_torch_fsdp2:
        return stages
    return [
        sharded_memory(
            stage,
            plan.shape,
            plan.layout,
            padded_vocab=plan.padded_vocab_size,
            dtype_bytes=DTYPE_BYTES[plan.dtype_name],
            adapter_parameters=0 if plan.adapters is None else adapter_parameters(plan.shape, plan.adapters),
            trained=plan.trained,
            reshard_after_forward=plan.config.parallel.torch_fsdp2_reshard_after_forward,
        )
        for stage in stages
    ]


def _adapters_of_all_ranks(plan: Plan) -> int:
    """Parameters of adapters on the ranks of a replica, those that several of them hold counted for each."""
    return local_adapter_parameters(plan.shape, plan.adapters, plan.layout) * plan.layout.tp * plan.layout.pp


def _on_cpu(plan: Plan) -> bool:
    """Whether the plan is for a CPU."""
    from mindspeed_llm import accelerator

    device = plan.config.runtime.device
    return device == "cpu" or (device == "auto" and accelerator.current().name == "cpu")


def _loss_chunk(plan: Plan) -> int:
    """Rows of logits that the loss takes at once where nothing else is asked for."""
    from mindspeed_llm.ops.cross_entropy import rows_of_chunk

    row_bytes = DTYPE_BYTES[plan.dtype_name] * plan.padded_vocab_size // plan.tensor_parallel_size
    adapted = plan.adapters is not None and bool({"output_layer", "word_embeddings"} & set(plan.adapters.targets))
    frozen = not adapted and not plan.trained.has(head_name(plan.shape))
    return rows_of_chunk(row_bytes, frozen, "cpu" if _on_cpu(plan) else "")


def _dropout_mask_bytes(plan: Plan) -> int:
    """Of a number that adapters' dropout keeps or not: torch's mask on a CPU has the activation's type."""
    if plan.config.lora.lora_kernels != "torch":
        return 0
    return DTYPE_BYTES[plan.dtype_name] if _on_cpu(plan) else 1


def _score_bytes(plan: Plan) -> float:
    """Bytes that attention keeps of a token's probabilities, for each head; kernels compute them again.

    Documents are taken for as long as a row: where they are shorter, less is kept.
    """
    from mindspeed_llm.ops.attention_blocks import BLOCK_ROWS, LONGEST_KEPT

    length = plan.seq_length
    if plan.layout.cp > 1 or "core_attn" in recompute_modules(plan.config.recompute):
        return 0.0
    if not plan.config.operators.use_flash_attn:  # the softmax in fp32, and what is multiplied by the values
        return length * {"fp32": 4.0, "bf16": 6.0, "fp16": 6.0}[plan.dtype_name]
    if not _on_cpu(plan) or length > LONGEST_KEPT or plan.dtype_name == "fp16":
        return 0.0
    return DTYPE_BYTES[plan.dtype_name] * (length + min(length, BLOCK_ROWS)) / 2


def _swapping(options: MemoryConfig) -> Swapping:
    modules = swapped_modules(options.swap_modules) if options.swap_attention else []
    return Swapping(tuple(modules), options.swap_layer_input, swap_budget_bytes(options.swap_budget))


def show_plan(plan: Plan) -> None:
    """Print the plan: model, layout, batches, length, memory, rules with their legal values."""
    console = _console()
    sections = [("model", _model(plan)), ("weights", _weights(plan)), ("layout", _layout(plan))]
    if plan.config.door != "inference":
        sections += [("batch", _batch(plan)), ("data", _data(plan)), ("memory per device", _memory(plan))]
    for title, rows in sections:
        console.print(_table(title, rows))
    if plan.adapters is not None:
        console.print(_adapters(plan))
    for table in grid_tables(plan.layout, plan.shape):
        console.print(table)
    console.print(_rules(plan))
    console.print(" nothing was started", markup=False)


def show_adapters(plan: Plan) -> None:
    """Print what the run's adapters are on."""
    _console().print(_adapters(plan))


def _console():
    from rich.console import Console

    return Console(width=None if Console().is_terminal else 118, highlight=False)


def _table(title: str, rows: list[tuple[str, str]]):
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, title_style="bold")
    table.add_column(width=26)
    table.add_column(min_width=60)
    for name, value in rows:
        table.add_row(name, value)
    return table


def _model(plan: Plan) -> list[tuple[str, str]]:
    s = plan.shape
    heads = f"{s.num_attention_heads} heads, {s.num_query_groups} key/value groups, width {s.kv_channels}"
    bound = "" if s.attention_softcap is None else f", scores below {s.attention_softcap}"
    rows = [
        ("family", s.family),
        ("parameters", f"{s.num_parameters():,}"),
        ("layers", f"{s.num_layers} x hidden {s.hidden_size}, MLP {s.ffn_hidden_size}"),
        *_expert_row(s),
        ("attention", heads + (f", window {s.window_size}" if s.window_size else "") + bound),
        ("vocabulary", f"{s.vocab_size:,} (padded to {plan.padded_vocab_size:,})"),
        ("positions", f"{s.max_position_embeddings:,}, rope {(s.rope_scaling or {}).get('rope_type', 'default')}"),
        ("precision", plan.dtype_name + (", linears of the layers in NF4 (--qlora)" if plan.holds_nf4 else "")),
    ]
    if plan.config.operators.compile_operators:
        rows.append(("operators", "norms, gates, rotary embedding and NF4 compiled for this CPU where they are fused"))
    if plan.adapters is not None:
        rows.append(("LoRA", adapter_line(plan)))
    if plan.config.door != "inference" and plan.trained.selects:
        own = count_parameters(s, plan.trained.has_tensor)
        beside = " beside the adapters" if plan.adapters is not None else ""
        rows.append(("trained", f"{own:,} of these parameters ({100 * own / s.num_parameters():.2f} %){beside}"))
    return rows


def adapter_line(plan: Plan) -> str:
    """The settings of all adapters in a line."""
    a = plan.adapters
    words = ["DoRA"] if a.use_dora else []
    words += [
        f"rank {a.rank}",
        f"alpha {a.alpha:g}" + (" / sqrt(rank)" if a.use_rslora else ""),
        f"dropout {a.dropout}",
    ]
    words += ["frozen weights laid out for their products"] if plan.config.lora.lora_prepack else []
    return ", ".join(words + ([f"B learns {a.loraplus_lr_ratio:g} x faster"] if a.loraplus_lr_ratio != 1.0 else []))


def _adapters(plan: Plan):
    """Targets, the linears they are, and what is trained of each."""
    from rich.table import Table

    linears = adapted_linears(plan.shape, plan.adapters)
    trained, total = adapter_parameters(plan.shape, plan.adapters), plan.shape.num_parameters()
    share = f"trained: {trained:,} parameters ({100 * trained / total:.2f} %)"
    table = Table(title=f"LoRA: {share}", title_justify="left", title_style="bold")
    for name in ("linear", "parts with an A of their own", "linears", "rank", "scaling", "trained parameters"):
        table.add_column(name, justify="right" if name in ("linears", "trained parameters") else "left")
    for row in linears:
        ranks, scalings = (" ".join(f"{value:g}" for value in values) for values in (row.ranks, row.scalings))
        parts = " ".join(row.parts) or "one A for all"
        table.add_row(row.module, parts, f"{row.count:,}", ranks, scalings, f"{row.parameters:,}")
    return table


def _expert_row(s: ModelShape) -> list[tuple[str, str]]:
    if not s.num_moe_experts:
        return []
    layers = sum(map(s.is_moe_layer, range(s.num_layers)))
    shared = s.moe_shared_expert_intermediate_size
    text = f"{s.num_moe_experts} x MLP {s.moe_ffn_hidden_size} in {layers} layers, {s.moe_router_topk} for each token"
    return [("experts", text + (f", shared MLP {shared}" if shared else ""))]


def _weights(plan: Plan) -> list[tuple[str, str]]:
    source = plan.weights
    absent = not_there_yet(plan.config)
    otherwise = f"{absent['--load']} (not there yet)" if "--load" in absent else f"random, seed {plan.config.data.seed}"
    rows = [("from", f"{source.path} ({source.format})" if source else otherwise)]
    if plan.adapter_source is not None:
        rows.append(("adapters from", f"{plan.adapter_source.path} ({plan.adapter_source.format})"))
    if plan.resume is not None:
        rows.append(("resume", f"after iteration {plan.resume.record['progress']['iteration']}"))
    if plan.config.checkpoint.save is not None:
        rows.append(("saved to", plan.config.checkpoint.save))
        rows.append(("checkpoint", _checkpoint_size(plan)))
    return rows


def _checkpoint_size(plan: Plan) -> str:
    """Size of one checkpoint, and how much room there is; beside adapters what is frozen is not saved."""
    trained, itemsize = plan.trainable_parameters(), DTYPE_BYTES[plan.dtype_name]
    moment = OptimizerForm.of(plan.config.optimizer, plan.config.memory).moment_bytes
    each = trained * bytes_of_parameter(itemsize, not plan.config.checkpoint.no_save_optim, moment)
    if plan.adapters is None:
        each += (plan.shape.num_parameters() - trained) * itemsize
    free = in_units(free_bytes(Path(plan.config.checkpoint.save)))
    keep = plan.config.checkpoint.keep_last
    kept = f"the newest {keep} and one being written are kept" if keep else "all are kept"
    return f"about {in_units(each)}; {kept}; {free} free"


def _layout(plan: Plan) -> list[tuple[str, str]]:
    p, layout = plan.config.parallel, plan.layout
    context = f" x context {layout.cp}" if layout.cp > 1 else ""
    sizes = f"tensor {layout.tp} x pipeline {layout.pp}{context} x data {layout.dp}"
    rows = [
        ("processes", f"{plan.world_size} = {sizes}"),
        ("sequence parallel", "yes" if plan.sequence_parallel else "no"),
        ("distributed optimizer", "yes" if p.use_distributed_optimizer else "no"),
    ]
    if p.use_torch_fsdp2:
        times = "twice" if p.torch_fsdp2_reshard_after_forward else "once"
        ranks = layout.dp * layout.cp
        rows.append(("fully sharded (FSDP2)", f"over {ranks} processes; layers gathered {times} a micro-batch"))
    if layout.cp > 1:
        rows.append(("context parallel by", p.context_parallel_algo))
    if plan.shape.num_moe_experts:
        share = plan.shape.num_moe_experts // layout.ep
        rows.append(
            (
                "experts",
                f"{plan.shape.num_moe_experts} over expert parallel {layout.ep} ({share} each) x expert tensor "
                f"{layout.expert_tp}, {layout.edp} replicas" + _expert_overlap(plan),
            )
        )
    if layout.pp > 1:
        rows.append(("pipeline idles", f"{100 * pipeline_idle_share(plan):.1f} % of a step"))
    return rows


def _expert_overlap(plan: Plan) -> str:
    """What is computed while tokens travel."""
    e, shared = plan.config.experts, plan.shape.moe_shared_expert_intermediate_size
    beside = ["shared experts"] * bool(shared) + ["other experts"] * e.moe_alltoall_overlap_comm
    on = e.moe_shared_expert_overlap or e.moe_alltoall_overlap_comm
    return f"; tokens travel while {' and '.join(beside)} compute" if on else ""


def pipeline_idle_share(plan: Plan) -> float:
    """Share of a step in which a stage waits while the pipeline fills and drains: (p - 1) / (v m + p - 1).

    Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters" (2021), section 2.2; p stages, v
    chunks per stage, m micro-batches.
    """
    behind = plan.layout.pp - 1
    return behind / (plan.layout.layers.vpp * plan.num_micro_batches + behind)


def _batch(plan: Plan) -> list[tuple[str, str]]:
    t = plan.config.training
    equation = (
        f"{plan.global_batch_size} = micro batch {t.micro_batch_size} x data parallel {plan.data_parallel_size} x "
        f"{plan.num_micro_batches} accumulation steps"
    )
    rows = [("global batch", equation), ("sequence length", f"{plan.seq_length:,}")]
    rows.append(("tokens per step", f"at most {plan.global_batch_size * plan.seq_length:,}"))
    if t.train_iters is not None:
        tokens = t.train_iters * plan.global_batch_size * plan.seq_length
        rows.append(("iterations", f"{t.train_iters:,} (at most {tokens:,} tokens)"))
    elif t.train_samples is not None:
        rows.append(("iterations", f"{t.train_samples // plan.global_batch_size:,} ({t.train_samples:,} samples)"))
    else:
        rows.append(("epochs", f"{t.train_epochs or 1:g}"))
    return rows


def _data(plan: Plan) -> list[tuple[str, str]]:
    words = plan.config.data.data_path
    if not words:
        return [("data path", "not given")]
    return [row for source in parse_data_path(words) for row in _data_set(source)]


def _data_set(source: WeightedPath) -> list[tuple[str, str]]:
    path, title = source.path, "data path" if source.weight is None else f"data path, weight {float(source.weight):g}"
    found = find_dataset(path)
    if found is None:
        there = Path(path).exists()
        return [(title, f"{path} ({'raw: preprocessed into the cache at start' if there else 'not there yet'})")]
    try:
        counts = read_record(found[0]).counts
    except UserError as wrong:
        return [(title, str(wrong))]
    rows = [(title, path)]
    rows += [(name, f"{counts[name]:,}") for name in ("documents", "tokens", "trained_tokens") if name in counts]
    return rows


def _memory(plan: Plan) -> list[tuple[str, str]]:
    m = plan_memory(plan)
    parts = [("weights", m.weights), ("gradients", m.gradients), ("optimizer", m.optimizer)]
    rows = [*parts, ("activations (estimate)", m.activations)]
    rows += [("temporary (estimate)", m.temporary), ("together", m.total)]
    sizes = [(name, _size(count)) for name, count in rows]
    if m.optimizer_on_host:
        times = plan.config.memory.swap_optimizer_times
        sizes.append(("optimizer on the host", f"{_size(m.optimizer_on_host)}, stepped in {times} windows"))
    if what := swapped_parts(plan.config.memory):
        condition = "" if plan.config.memory.swap_budget != "auto" else ", if that transfers while layers compute"
        sizes.append(("swapped to the host", f"{_size(m.swapped)} of what {what} save{condition}"))
    return [*sizes, ("fullest stage", str(m.stage))] if plan.layout.pp > 1 else sizes


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _rules(plan: Plan):
    from rich.table import Table

    table = Table(title="rules", title_justify="left", title_style="bold")
    for name in ("condition", "holds", "legal"):
        table.add_column(name)
    for rule in plan.rules:
        table.add_row(rule.says, "yes" if rule.ok else "NO", rule.legal)
    return table
