"""The order in which layers run forward and backward, which repeats: the last time tells what comes next."""

from __future__ import annotations

from typing import NamedTuple


class Event(NamedTuple):
    """A layer's forward pass has ended, or its backward pass begins; `number` counts forward passes of layers."""

    backward: bool
    number: int


class Order:
    """Events since all backward passes were done the last time, beside those of the time before.

    Pipelines run the micro-batches of a step in an order of their own; without one every micro-batch repeats it.
    """

    def __init__(self) -> None:
        self._known: list[Event] = []
        self._seen: list[Event] = []
        self._as_known = False

    @property
    def has_begun(self) -> bool:
        """Whether anything has happened in this round."""
        return bool(self._seen)

    def begin(self) -> None:
        """A new round: what was seen is known now."""
        self._known, self._seen = self._seen, []
        self._as_known = bool(self._known)

    def see(self, event: Event) -> None:
        """The event happens."""
        at = len(self._seen)
        self._as_known = self._as_known and at < len(self._known) and self._known[at] == event
        self._seen.append(event)

    def next_backward(self) -> int | None:
        """Whose backward pass comes next; None where that is not known, or a forward pass comes first."""
        if self._as_known:
            following = self._known[len(self._seen) :][:1]
            return following[0].number if following and following[0].backward else None
        if self._seen and self._seen[-1].backward and self._seen[-1].number:
            return self._seen[-1].number - 1  # the layer before
        return None

    def returns_at_once(self, number: int) -> bool:
        """Whether the backward pass of the forward pass that is running follows it directly, as far as is known."""
        at = len(self._seen)
        return self._as_known and self._known[at : at + 2] == [Event(False, number), Event(True, number)]
