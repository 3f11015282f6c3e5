"""The one exception that a user is meant to read: printed as a line, without a traceback, exit status 1."""

from __future__ import annotations


class UserError(ValueError):
    """`what: value is wrong, because ...; legal: ...; try: ...` in one line.

    Doors print it and exit with status 1; as a ValueError it behaves normally for callers of the Python API.
    """


class OutOfMemory(UserError):
    """The device has no memory left, with what would have fitted; what the run has trained so far is sound."""
