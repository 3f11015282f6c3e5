"""Sizes of HCCL's buffers, group by group: `--hccl-group-buffer "dp:200;tp:300"`, in MB.

Every communicator has buffers of its own, 200 MB by default, and a large job has a dozen communicators.
"""

from __future__ import annotations

# Names of groups in the flag -> how megatron-core describes them when it makes them (parallel_state.py).
DESCRIPTIONS: dict[str, tuple[str, ...]] = {
    "dp": ("DATA_PARALLEL_GROUP",),
    "dp_cp": ("DATA_PARALLEL_GROUP_WITH_CP", "DATA_PARALLEL_GROUP_WITH_CP_AG"),
    "cp": ("CONTEXT_PARALLEL_GROUP",),
    "mp": ("MODEL_PARALLEL_GROUP",),
    "tp": ("TENSOR_MODEL_PARALLEL_GROUP",),
    "pp": ("PIPELINE_MODEL_PARALLEL_GROUP",),
    "embd": ("EMBEDDING_GROUP",),
    "pos_embd": ("POSITION_EMBEDDING_GROUP",),
    "tp_dp_cp": ("TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP",),
    "tp_dp": ("TENSOR_AND_DATA_PARALLEL_GROUP",),
    "tp_cp": ("TENSOR_AND_CONTEXT_PARALLEL_GROUP",),
    "ep": ("EXPERT_MODEL_PARALLEL_GROUP",),
    "ep_tp": ("EXPERT_TENSOR_PARALLEL_GROUP",),
    "tp_ep": ("EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP",),
    "tp_ep_pp": ("EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP",),
    "ep_dp": ("EXPERT_DATA_PARALLEL_GROUP",),
}
# The size of groups that have none of their own; HCCL's default where this is not given either.
OTHER_GROUPS = "default"
_SHORT = {description: name for name, descriptions in DESCRIPTIONS.items() for description in descriptions}


def short_name(description: str | None) -> str | None:
    """Name in the flag of the group that megatron describes so; None for others."""
    return _SHORT.get(description)


def parse_buffers(text: str) -> dict[str, int]:
    """ "dp:200;tp:300" -> {"dp": 200, "tp": 300}.

    Raises:
        ValueError: what is wrong with the text, and what is legal.
    """
    sizes: dict[str, int] = {}
    for entry in filter(None, text.split(";")):
        name, _, megabytes = (part.strip() for part in entry.partition(":"))
        if name not in DESCRIPTIONS and name != OTHER_GROUPS:
            raise ValueError(f"{name!r} is no group; legal: {', '.join([*DESCRIPTIONS, OTHER_GROUPS])}")
        if not megabytes.isdigit() or int(megabytes) == 0:
            raise ValueError(f"{entry.strip()!r} has no size; legal: GROUP:MEGABYTES;..., e.g. dp:200;tp:300")
        if name in sizes:
            raise ValueError(f"{name} is given twice; legal: each group once")
        sizes[name] = int(megabytes)
    return sizes


def buffers_problem(text: str) -> str | None:
    """What is wrong with the text, None when nothing is."""
    try:
        parse_buffers(text)
    except ValueError as problem:
        return str(problem)
    return None
