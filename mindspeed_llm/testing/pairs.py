"""Few cases in which every two values of different factors meet: most faults of a combination take no more than two.

cases = covering({"layout": ("tp2", "pp2"), "dropout": ("", "0.1")}, lambda case: True)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

Case = dict[str, str]
Pair = tuple[str, str, str, str]


def pairs_of(case: Case) -> set[Pair]:
    """(factor, value, other factor, its value) of every two values in a case."""
    return {(*one, *other) for one, other in combinations(case.items(), 2)}


def legal_cases(factors: Mapping[str, Sequence[str]], legal: Callable[[Case], bool]) -> list[Case]:
    """Every legal combination."""
    whole = (dict(zip(factors, values)) for values in product(*factors.values()))
    return [case for case in whole if legal(case)]


def covering(
    factors: Mapping[str, Sequence[str]],
    legal: Callable[[Case], bool],
    cost: Callable[[Case], float] = lambda case: 1.0,
) -> list[Case]:
    """Legal cases that contain every pair which any legal case contains; the same ones at every call.

    Greedy: always the case that adds most pairs for its cost (Cohen et al., "The AETG System", 1997, does this with
    random candidates; here there are few enough cases to look at all).

    Args:
        factors: name -> values.
        legal: whether a case can be.
        cost: of a case, above 0.
    """
    cases = legal_cases(factors, legal)
    numbers: dict[Pair, int] = {}
    for case in cases:
        for pair in pairs_of(case):
            numbers.setdefault(pair, len(numbers))
    sets = [sum(1 << numbers[pair] for pair in pairs_of(case)) for case in cases]
    costs = [cost(case) for case in cases]
    missing, chosen = (1 << len(numbers)) - 1, []
    while missing:
        best = max(range(len(cases)), key=lambda n: ((sets[n] & missing).bit_count() / costs[n], -n))
        chosen.append(cases[best])
        missing &= ~sets[best]
    return chosen
