"""Flags of the upstream recipes that this library does not have, each with what became of it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("upstream_flags.csv")


@dataclass(frozen=True)
class UpstreamFlag:
    """One row of upstream_flags.csv.

    Attributes:
        status: "no effect" (accepted, said in one line at start) or "refused".
        reason: why, and what to use instead.
    """

    flag: str
    status: str
    reason: str


@cache
def upstream_flags() -> dict[str, UpstreamFlag]:
    """The rows of the table by flag."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {row["flag"]: UpstreamFlag(**row) for row in csv.DictReader(file)}
