"""Whether the hub can be reached: its clients try for half a minute and more before they say that it cannot."""

from __future__ import annotations

import contextlib
import os
import socket
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

CONNECT_SECONDS = 5.0
"""A hub on another continent answers within one; a firewall that drops packets never does."""


def endpoint() -> str:
    """Address of the hub: huggingface.co, or the mirror in HF_ENDPOINT."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def hub_answers() -> bool:
    """Whether something listens at the hub's address. With a proxy between, that is for its clients to find out."""
    address = urlsplit(endpoint())
    if urllib.request.getproxies().keys() & {address.scheme, "all"}:
        return True
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def cached_only() -> Iterator[None]:
    """`datasets` in its offline mode: it looks into its cache and asks nobody."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
