"""Options that trade time or host memory for memory of the device."""

from __future__ import annotations

from mindspeed_llm.config.schema import at_least, option, section

# Smaller tensors are not swapped: a transfer costs more to start than it saves. MindSpeed's limit too.
SMALL_BYTES = 2**20
# Values of the optimizer's state that a step makes fp32 at once; each takes some dozens of bytes meanwhile.
STEP_VALUES = 2**22

# What of a decoder layer can swap what it saves; the first three are what upstream swaps.
SWAP_MODULES = ("input_norm", "self_attention", "post_attention_norm", "mlp")


def swapped_modules(text: str) -> list[str]:
    """The names in a value of --swap-modules."""
    return [name for name in text.replace(" ", "").split(",") if name]


def _are_modules(text: str) -> str | None:
    names = swapped_modules(text)
    if names and set(names) <= set(SWAP_MODULES):
        return None
    return f"legal: one or more of {', '.join(SWAP_MODULES)}, with commas between them"


def swap_budget_bytes(text: str) -> int | None:
    """Bytes of host memory for swapped tensors; None for as much as hides behind computation."""
    return None if text == "auto" else int(float(text) * 1e9)


def _is_budget(text: str) -> str | None:
    try:
        good = text == "auto" or 0 < float(text) < float("inf")
    except ValueError:
        good = False
    return None if good else "legal: auto, or gigabytes of host memory such as 40"


def swapped_parts(options: MemoryConfig) -> str:
    """What is swapped, in words; "" for nothing."""
    parts = swapped_modules(options.swap_modules) if options.swap_attention else []
    return ", ".join([*parts, *["recomputed layers"] * options.swap_layer_input])


@section
class MemoryConfig:
    """Saved tensors and optimizer state where the device does without them, see docs/memory.md."""

    swap_attention: bool = option(
        help="keep what chosen modules save for the backward pass on the host until shortly before it", level="advanced"
    )
    swap_modules: str = option(
        "input_norm,self_attention,post_attention_norm",
        help=f"the modules of --swap-attention, of {', '.join(SWAP_MODULES)}",
        level="advanced",
        check=_are_modules,
    )
    swap_layer_input: bool = option(
        help="with --recompute-granularity full: keep the layers' inputs on the host", level="advanced"
    )
    swap_budget: str = option(
        "auto",
        help="how much is swapped: what transfers in the time of computing, or up to so many GB of each process",
        level="advanced",
        check=_is_budget,
        metavar="auto|GB",
    )
    swap_optimizer: bool = option(
        help="keep fp32 weights and moments on the host; steps bring them to the device in windows", level="advanced"
    )
    swap_optimizer_times: int = option(
        16,
        help="in how many windows --swap-optimizer steps; the device holds two of them",
        level="expert",
        check=at_least(1),
    )
    reuse_fp32_param: bool = option(
        help="with --bf16: keep of each fp32 weight only what its bf16 one lacks, to put both together for the step",
        level="advanced",
    )
