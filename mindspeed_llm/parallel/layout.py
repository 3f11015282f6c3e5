"""The parallel layout of a run: its sizes, its layer map, and where each rank stands in it. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_llm.parallel.context_split import SequenceSplit
from mindspeed_llm.parallel.layer_map import LayerMap


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands: its number within each kind of group.

    `dp`, `cp`, `tp` place it among the dense layers, `edp`, `ep`, `etp` among the experts, `pp` in both.
    """

    pp: int
    dp: int
    cp: int
    tp: int
    edp: int
    ep: int
    etp: int


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of all kinds of parallelism.

    Ranks are numbered as megatron-core's default order "tp-cp-ep-dp-pp" does (`parallel_state.RankGenerator`): tensor
    parallel ranks are neighbours, pipeline stages are farthest apart. The dense layers of a stage are spread over
    tp x cp x dp ranks, its experts over etp x ep x edp of the same ranks.

    Args:
        layers: which layers live where.
        world_size: number of ranks, a multiple of tp x pp x cp.
        tp, cp, ep: tensor, context and expert parallel sizes.
        etp: tensor-parallel size within an expert; None means tp.
        ulysses: context-parallel ranks that exchange heads; the other cp / ulysses form a ring.
        ring_window: ranks of an inner ring of that ring.
    """

    layers: LayerMap
    world_size: int = 1
    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    ulysses: int = 1
    ring_window: int = 1

    @property
    def sequence_split(self) -> SequenceSplit:
        """How context-parallel ranks share a sequence."""
        return SequenceSplit(self.cp, self.ulysses)

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return self.layers.pp

    @property
    def vpp(self) -> int | None:
        """Model chunks per stage, None without virtual stages (as megatron-core has it)."""
        return self.layers.vpp if self.layers.vpp > 1 else None

    @property
    def expert_tp(self) -> int:
        """Tensor-parallel size within an expert."""
        return self.tp if self.etp is None else self.etp

    @property
    def dp(self) -> int:
        """Replicas of the dense layers that see different samples."""
        return max(self.world_size // (self.tp * self.pp * self.cp), 1)

    @property
    def edp(self) -> int:
        """Replicas of each expert."""
        return max(self.world_size // (self.expert_tp * self.ep * self.pp), 1)

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank stands.

        Raises:
            IndexError: there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} is not in 0..{self.world_size - 1}")
        stage, within = divmod(rank, self.world_size // self.pp)
        dense, tp = divmod(within, self.tp)
        dp, cp = divmod(dense, self.cp)
        expert, etp = divmod(within, self.expert_tp)
        edp, ep = divmod(expert, self.ep)
        return Coordinates(pp=stage, dp=dp, cp=cp, tp=tp, edp=edp, ep=ep, etp=etp)
