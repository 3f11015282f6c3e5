"""Which changes of a plan would make it fit into less memory, the cheapest first; each is planned before it is named.

The cost of a change is what a step takes longer, as a share of its time. Those marked were measured on a CPU
(docs/benchmarks.md, Memory); the others are taken for what stands beside them. They order the changes and are told with
them.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from mindspeed_llm.checkpoint.space import in_units
from mindspeed_llm.config.memory import SWAP_MODULES
from mindspeed_llm.config.run import all_options
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.plan import Plan, resolve
from mindspeed_llm.plan.show import pipeline_idle_share, plan_memory

MOST_AT_ONCE = 3
SMALLER_LOSS_CHUNK = 256
IF_HIDDEN = "no slower where transfers hide behind computation"
OPTIMIZER_TRANSFERS = "slower by what the optimizer's state takes to the device and back"
OTHER_NUMBERS = "moments are rounded to bf16, which changes numbers"
COMMUNICATION = "slower by what its communication takes"


@dataclass(frozen=True)
class Change:
    """Options to set, and what that costs.

    Attributes:
        options: name -> value.
        slower: share of a step's time.
        says: further costs, in words.
        order: share of a step's time that `says` counts for where changes are put in order.
        processes: times as many are needed.
    """

    options: dict[str, Any]
    slower: float = 0.0
    says: tuple[str, ...] = ()
    order: float = 0.0
    processes: int = 1

    @property
    def cost(self) -> float:
        """By which changes are put in order."""
        return round(self.slower + self.order, 6)

    def words(self) -> str:
        """As flags of a command line."""
        flags = " ".join(_flag(name, value) for name, value in self.options.items())
        return flags + (f" on {self.processes} times as many devices" if self.processes > 1 else "")

    def price(self) -> str:
        """What a reader is told of the cost."""
        share = [f"about {100 * self.slower:.0f} % slower"] if self.slower >= 0.01 else []
        return ", ".join([*share, *dict.fromkeys(self.says)]) or "no slower"

    def __and__(self, other: Change) -> Change:
        return Change(
            self.options | other.options,
            self.slower + other.slower,
            self.says + other.says,
            self.order + other.order,
            self.processes * other.processes,
        )


@dataclass(frozen=True)
class Fitting:
    """A change whose plan fits.

    Attributes:
        total: predicted bytes of the fullest device.
        saved: fewer than now.
    """

    change: Change
    total: int
    saved: int = field(default=0)

    def line(self) -> str:
        """For the error message."""
        return f"{self.change.words()} (saves about {in_units(self.saved)}, {self.change.price()})"


def _flag(name: str, value: Any) -> str:
    option = all_options()[name]
    if value is True:
        return option.flags[0]
    return option.off_flags[0] if value is False else f"{option.flags[0]} {value}"


def changes(plan: Plan) -> list[Change]:
    """What could be changed alone, whether it is possible or not; what changes numbers says so."""
    c, layout = plan.config, plan.layout
    micro, fits_pipelines = c.training.micro_batch_size, plan.shape.num_layers >= 2 * layout.pp
    # Without a number of its own the global batch would follow the micro-batch and the replicas.
    batch = {} if c.training.global_batch_size is not None else {"global_batch_size": plan.global_batch_size}
    found = [
        Change({"use_distributed_optimizer": True}, 0.0),
        Change({"cross_entropy_loss_fusion": True}, 0.0),
        Change({"sequence_parallel": True}, 0.0),
        Change({"recompute_activation_function": True}, 0.04),  # measured
        Change({"recompute_norm": True}, 0.03),  # measured
        # Smaller products of the head.
        Change({"loss_chunk_size": SMALLER_LOSS_CHUNK}, 0.06),  # measured
        Change({"recompute_mla_up_proj": True}, 0.03),
        Change({"mla_zero_memory": True}, 0.05),
        # A bit more than both cheap recomputations.
        Change({"swap_attention": True, "swap_modules": ",".join(SWAP_MODULES)}, says=(IF_HIDDEN,), order=0.08),
        # Masters are put together and taken apart in every step, of some thousand tokens here (docs/memory.md).
        Change({"reuse_fp32_param": True}, 0.05),
        Change({"swap_optimizer": True}, says=(OPTIMIZER_TRANSFERS,), order=0.08),
        Change({"o2_optimizer": True}, says=(OTHER_NUMBERS,), order=0.3),
        # Smaller products; weights are read more often.
        *[Change({"micro_batch_size": size} | batch, 0.05 * micro / size) for size in _halves(micro)],
        # Experts' linears, two of three products of the forward pass, again.
        Change({"moe_zero_memory": "level0"}, 0.09),  # measured
        Change({"moe_zero_memory": "level1"}, 0.17),  # measured
        # The forward pass again; measured.
        Change({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, 0.28),
    ]
    # Parameters travel with every micro-batch.
    found.append(Change({"use_torch_fsdp2": True}, says=(COMMUNICATION,), order=0.12))
    # The same devices share more of the model and fewer samples. Links decide what that costs.
    sizes = {"tensor_model_parallel_size": layout.tp, "context_parallel_size": layout.cp}
    sizes |= {"expert_model_parallel_size": layout.ep} if plan.shape.num_moe_experts else {}
    for name, size in sizes.items():
        found.append(Change({name: 2 * size} | batch, says=(COMMUNICATION,), order=0.15))
        found.append(Change({name: 2 * size} | batch, says=(COMMUNICATION,), order=1.0, processes=2))
    if fits_pipelines:
        stages = {"pipeline_model_parallel_size": 2 * layout.pp} | batch
        found.append(Change(stages, _more_idle(plan), (COMMUNICATION,), order=0.1))
        found.append(Change(stages, _more_idle(plan), (COMMUNICATION,), order=1.0, processes=2))
    return [change for change in found if any(c.get(name) != value for name, value in change.options.items())]


def _halves(size: int) -> list[int]:
    """size / 2, size / 4, ... while they are whole."""
    found = []
    while size > 1 and size % 2 == 0:
        size //= 2
        found.append(size)
    return found


def _more_idle(plan: Plan) -> float:
    """Share of a step that twice as many stages idle more."""
    behind = 2 * plan.layout.pp - 1
    return behind / (plan.layout.layers.vpp * plan.num_micro_batches + behind) - pipeline_idle_share(plan)


def planned(plan: Plan, change: Change) -> Plan | None:
    """The plan with a change; None where the two do not go together."""
    config = copy.deepcopy(plan.config)
    for name, value in change.options.items():
        config.set(name, value, "advice")
    config.training.global_batch_size = plan.global_batch_size
    config.logging.dry_run, config.logging.world_size = True, plan.world_size * change.processes
    try:
        return resolve(config, [], tokenizer_size=plan.shape.vocab_size)
    except UserError:
        return None


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        fitting: the cheapest first.
        tried: changes that were planned.
        complete: whether all were, or enough fitted; otherwise time was up.
    """

    fitting: list[Fitting]
    tried: int
    complete: bool


def cheapest(plan: Plan, room: int, most: int = 3, without: Collection[str] = (), seconds: float = math.inf) -> Search:
    """The cheapest changes, alone or up to three together, that fit; none that has another one in it.

    Args:
        room: bytes of a device that the estimate may come to.
        most: so many at most.
        without: options that are no help here.
        seconds: no further one is planned after so long.
    """
    now, planning = plan_memory(plan).total, _Planning(plan, time.monotonic() + seconds)
    single = [change for change in changes(plan) if not change.options.keys() & set(without)]
    useful = [change for change in single if planning.total(change) < now]
    found: list[Fitting] = []
    for change in _together(useful):
        if len(found) == most:
            break
        if any(known.change.options.items() <= change.options.items() for known in found):
            continue
        total = planning.total(change)
        if total <= room:
            found.append(Fitting(change, int(total), int(now - total)))
    return Search(found, len(planning.totals), planning.complete or len(found) == most)


class _Planning:
    """Estimates of a plan with changes, each made once, as long as there is time.

    Attributes:
        totals: (options, processes) -> predicted bytes of the fullest device; infinite where it is impossible.
        complete: time was never up.
    """

    def __init__(self, plan: Plan, deadline: float) -> None:
        self._plan, self._deadline = plan, deadline
        self._impossible: list[Change] = []
        self.totals: dict[tuple[frozenset, int], float] = {}
        self.complete = True

    def total(self, change: Change) -> float:
        """Bytes with the change; infinite where it is impossible, or time is up."""
        key = frozenset(change.options.items()), change.processes
        if key in self.totals:
            return self.totals[key]
        # A third change seldom resolves what contradicts each other in pairs: such threes are left out.
        if any(it.options.items() <= key[0] and it.processes == change.processes for it in self._impossible):
            return math.inf
        if time.monotonic() > self._deadline:
            self.complete = False
            return math.inf
        changed = planned(self._plan, change)
        if changed is None:
            self._impossible.append(change)
        self.totals[key] = math.inf if changed is None else plan_memory(changed).total
        return self.totals[key]


def _together(single: Sequence[Change]) -> list[Change]:
    """One to three of them at once, cheapest first; none that contradict each other."""
    found = []
    for count in range(1, MOST_AT_ONCE + 1):
        for several in itertools.combinations(single, count):
            joined = several[0]
            for other in several[1:]:
                joined = joined & other
            if all(change.options.items() <= joined.options.items() for change in several):
                found.append(joined)
    return sorted(found, key=lambda change: (change.cost, len(change.options)))
