"""Whether the hub answers is found out once, by a connection, not by waiting for its clients to give up."""

import socket
import urllib.request

import pytest

from mindspeed_llm.data.hub import cached_only, endpoint, hub_answers


@pytest.fixture
def listening():
    """A port of this machine on which something listens, then its number again when nothing does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"no": "localhost"})


def test_the_mirror_is_the_one_asked(monkeypatch, listening):
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert endpoint() == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}/mirror")
    assert hub_answers()
    listening.close()
    assert not hub_answers()


def test_a_name_without_an_address_does_not_answer(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://no-such-host.invalid")
    assert not hub_answers()


@pytest.mark.parametrize("scheme, other", [("https", "http"), ("http", "https")])
def test_a_proxy_is_asked_by_the_clients(monkeypatch, scheme, other):
    """One for the other scheme is none."""
    monkeypatch.setenv("HF_ENDPOINT", f"{scheme}://no-such-host.invalid")
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {scheme: "http://proxy"})
    assert hub_answers()
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {other: "http://proxy"})
    assert not hub_answers()


def test_datasets_are_offline_for_a_while_only(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(KeyError), cached_only():
        assert datasets.config.HF_HUB_OFFLINE
        raise KeyError
    assert not datasets.config.HF_HUB_OFFLINE
