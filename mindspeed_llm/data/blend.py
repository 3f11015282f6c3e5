"""Blending several data sets: which of them each sample of a run comes from, as arithmetic on the sample's number.

`--data-path 0.3 A 0.7 B` (Megatron's form) asks for 3 samples of A on 7 of B. Megatron gives each sample to the set
that is furthest behind, which needs a table as long as the run. Here the sets are the leaves of a binary tree, and each
node shares its samples out between its two sides as evenly as whole numbers allow; so the set of sample k, and how many
samples of each set came before it, are a few multiplications for any k, and a resume needs nothing but k.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mindspeed_llm.data.samplers import GlobalBatchSampler
from mindspeed_llm.errors import UserError


@dataclass(frozen=True)
class WeightedPath:
    """One data set of `--data-path`; the weight is None when sets are blended by their size."""

    path: str
    weight: Fraction | None


def parse_data_path(words: Sequence[str]) -> list[WeightedPath]:
    """The sets that `--data-path` names: `A`, `A B ...`, or `WEIGHT A WEIGHT B ...`.

    Raises:
        UserError: weights and paths do not alternate, or a weight is not above 0.
    """
    words = [str(word).strip() for word in words]
    weights = [_number(word) for word in words]
    if all(weight is None for weight in weights):
        return [WeightedPath(path, None) for path in words]
    paths, shares = words[1::2], weights[::2]
    if len(words) % 2 or any(share is None for share in shares) or any(w is not None for w in weights[1::2]):
        raise UserError(
            f"--data-path: '{' '.join(words)}' mixes weights and paths, because every data set needs a weight or none "
            "may have one; legal: A, A B, 0.3 A 0.7 B; try: ./3 for a path that reads as a number"
        )
    if wrong := [word for word, share in zip(words[::2], shares) if share <= 0]:
        raise UserError(
            f"--data-path: weight {wrong[0]} is wrong, because nothing would be read; legal: above 0; try: leave the "
            "data set out"
        )
    return [WeightedPath(path, share) for path, share in zip(paths, shares)]


def _number(word: str) -> Fraction | None:
    """Exactly the number that was written (0.3 is 3/10), None for anything else."""
    try:
        return Fraction(word) if math.isfinite(float(word)) else None
    except ValueError:
        return None


@dataclass(frozen=True)
class _Node:
    """Two sides of the tree; `share` of `total` samples go left."""

    left: _Node | int
    right: _Node | int
    share: int
    total: int

    def taken(self, samples: int) -> int:
        """How many of the first `samples` go left: the whole number nearest to their share."""
        return (2 * samples * self.share + self.total) // (2 * self.total)


class Shares:
    """Turns of several sets by weight: sample k belongs to exactly one, and is its j-th.

    After any number of samples a set of two or three is at most one sample away from its exact share, a set of many
    less than two (each node is off by half a sample at most, and Huffman's order of joining keeps what is above a set
    from adding up). Megatron's greedy rule has no such bound; on random weights it is off by up to 1.7 where this is
    off by 1.2.

    Args:
        weights: above 0; only their ratios count.
    """

    def __init__(self, weights: Sequence[Fraction | int]) -> None:
        scale = math.lcm(*(Fraction(w).denominator for w in weights))
        whole = [int(w * scale) for w in weights]
        divisor = math.gcd(*whole)
        self.weights = [w // divisor for w in whole]
        self._tree = _tree(self.weights)

    def __len__(self) -> int:
        """Number of sets."""
        return len(self.weights)

    def at(self, sample: int) -> tuple[int, int]:
        """(set, number of its samples before this one) of sample k = 0, 1, 2, ..."""
        node = self._tree
        while isinstance(node, _Node):
            before = node.taken(sample)
            if node.taken(sample + 1) > before:
                node, sample = node.left, before
            else:
                node, sample = node.right, sample - before
        return node, sample

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` belong to each set."""
        counts = [0] * len(self)
        waiting: list[tuple[_Node | int, int]] = [(self._tree, samples)]
        while waiting:
            node, of_node = waiting.pop()
            if isinstance(node, _Node):
                left = node.taken(of_node)
                waiting += [(node.left, left), (node.right, of_node - left)]
            else:
                counts[node] = of_node
        return counts


def _tree(weights: Sequence[int]) -> _Node | int:
    """Huffman's tree: the two lightest are joined until one is left; equal ones in the order they are given."""
    heap: list[tuple[int, int, _Node | int]] = [(weight, i, i) for i, weight in enumerate(weights)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (light, _, right), (heavy, _, left) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (light + heavy, len(weights) + len(heap), _Node(left, right, heavy, light + heavy)))
    return heap[0][2]


@dataclass(frozen=True)
class Member:
    """A data set of a blend and the order of its own samples."""

    dataset: Any
    sampler: GlobalBatchSampler


class BlendedDataset:
    """Samples numbered from 0 without end, of several data sets in turn; each makes its own epochs and shuffles.

    Args:
        members: the sets; each has at least one sample.
        weights: one for each, None for as many samples of each as it has.
    """

    num_rows = None  # the order is the blend's own affair

    def __init__(self, members: Sequence[Member], weights: Sequence[Fraction] | None) -> None:
        self.members = list(members)
        self.shares = Shares(weights or [m.dataset.samples_per_epoch for m in members])

    @property
    def samples_per_epoch(self) -> int:
        """As many samples as all sets have together: by size that is each once, by weight some more and some less."""
        return sum(m.dataset.samples_per_epoch for m in self.members)

    @property
    def packed(self) -> bool:
        """Whether rows of any set hold several samples."""
        return any(m.dataset.packed for m in self.members)

    def locate(self, index: int) -> tuple[Member, int]:
        """(set, number within it) of sample `index`."""
        number, position = self.shares.at(index)
        member = self.members[number]
        return member, member.sampler.index(position)

    def sample(self, index: int) -> dict[str, Any]:
        """Sample `index`, as the set it belongs to gives it."""
        member, row = self.locate(index)
        return member.dataset.sample(row)

    def describe(self, index: int) -> str:
        """Where sample `index` lies, for messages."""
        member, row = self.locate(index)
        return member.dataset.describe(row)

    def fingerprint(self) -> str:
        """Hex digest of all files and of the ratios: changes when the order of the samples does."""
        parts = [[m.dataset.fingerprint(), weight] for m, weight in zip(self.members, self.shares.weights)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
