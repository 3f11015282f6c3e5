"""The mechanism of patching, on packages made for the test."""

import importlib
import sys
import textwrap

import pytest

from mindspeed_llm import patching
from mindspeed_llm.errors import UserError
from mindspeed_llm.patching import Patch, fingerprint, registry


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `victim` whose module `user` imported everything of `source` by value, under other names."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "source.py").write_text(
        textwrap.dedent(
            """
            def add(a, b):
                return a + b

            class Counter:
                def step(self):
                    return 1

                @staticmethod
                def zero():
                    return 0
            """
        )
    )
    (folder / "user.py").write_text(
        "from victim.source import add as plus, Counter\n\ndef use(a, b): return plus(a, b)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("victim.user")
    # Patches of the session's own, if any, are none of these tests' business.
    monkeypatch.setattr(registry, "_applied", {})
    yield sys.modules["victim.source"], sys.modules["victim.user"]
    patching.undo()
    for name in [name for name in sys.modules if name.startswith("victim")]:
        del sys.modules[name]


def patch(source, target, name="patch", **kwargs):
    value = source
    for part in target.split("."):
        value = vars(value)[part]
    return Patch(
        name, f"victim.source:{target}", "a reason", fingerprints={"unversioned": fingerprint(value)}, **kwargs
    )


def doubled(original):
    return lambda *args: 2 * original(*args)


def test_a_wrap_reaches_names_already_imported_and_undo_restores_them(package):
    source, user = package
    original = source.add
    assert patching.apply([patch(source, "add", wrap=doubled)]) == ["patch"]
    assert source.add(1, 2) == user.use(1, 2) == user.plus(1, 2) == 6
    assert patching.undo() == ["patch"]
    assert source.add is original and user.plus is original and user.use(1, 2) == 3


def test_a_module_imported_later_sees_the_patch(package):
    source, _ = package
    del sys.modules["victim.user"]
    patching.apply([patch(source, "add", wrap=doubled)])
    assert importlib.import_module("victim.user").use(1, 2) == 6


@pytest.mark.parametrize("restores", [True, False], ids=["", "control"])
def test_a_module_imported_meanwhile_gets_the_original_back(package, monkeypatch, restores):
    source, _ = package
    original, counter = source.add, source.Counter

    class Replacement:
        pass

    del sys.modules["victim.user"]
    if not restores:
        monkeypatch.setattr(registry, "_restore_imported", lambda entry: None)
    catalogue = [patch(source, "add", wrap=doubled), patch(source, "Counter", "counter", replace=Replacement)]
    patching.apply(catalogue)
    user = importlib.import_module("victim.user")
    user.ours = Replacement
    assert user.Counter is Replacement and user.plus is source.add is not original
    patching.undo()
    assert (user.plus is original, user.Counter is counter) == (restores, restores)
    assert user.ours is Replacement, "a replacement has a name of its own, too"


def test_twice_is_once(package):
    source, _ = package
    catalogue = [patch(source, "add", wrap=doubled)]
    patching.apply(catalogue)
    assert patching.apply(catalogue) == []
    assert source.add(1, 2) == 6


def test_methods_and_static_methods(package):
    source, user = package
    catalogue = [
        patch(source, "Counter.step", "step", replace=lambda self: 5),
        patch(source, "Counter.zero", "zero", wrap=lambda original: lambda: original() + 7),
    ]
    patching.apply(catalogue)
    assert (user.Counter().step(), user.Counter.zero(), user.Counter().zero()) == (5, 7, 7)
    patching.undo(["step"])
    assert (source.Counter().step(), source.Counter.zero()) == (1, 7)
    patching.undo()
    assert source.Counter.zero() == 0 and isinstance(vars(source.Counter)["zero"], staticmethod)


def test_the_order_of_a_catalogue_has_no_effect(package):
    source, user = package
    catalogue = [patch(source, "add", "a", wrap=doubled), patch(source, "Counter.step", "b", replace=lambda self: 5)]
    for order in (catalogue, catalogue[::-1]):
        patching.apply(order)
        assert (user.use(1, 2), user.Counter().step()) == (6, 5)
        patching.undo()


def test_conditions_look_at_the_final_configuration(package):
    source, _ = package
    catalogue = [patch(source, "add", wrap=doubled, condition=lambda config: config["double"])]
    assert patching.apply(catalogue) == []
    assert patching.apply(catalogue, {"double": False}) == []
    assert patching.apply(catalogue, {"double": True}) == ["patch"]
    assert source.add(1, 2) == 6


def test_an_absent_package_excuses_a_target_and_another_name_for_its_module_does_not(package, tmp_path):
    """Otherwise a renamed module would be left as it is, without a word."""
    (tmp_path / "victim" / "kernels.py").write_text("import no_such_package\n")

    def needing(module, needs):
        return Patch("p", f"victim.{module}:f", "a reason", replace=1, fingerprints={"unversioned": "0"}, needs=needs)

    assert patching.apply([needing("kernels", "no_such_package"), needing("absent.kernels", "victim.absent")]) == []
    for module, needs in (("renamed", "no_such_package"), ("kernels", "victim.absent"), ("source.f", "victim.source")):
        with pytest.raises(UserError, match=f"victim.{module}:f is missing"):
            patching.apply([needing(module, needs)])


def test_a_missing_target_is_an_error_and_nothing_is_applied(package):
    source, _ = package
    good = patch(source, "add", "good", wrap=doubled)
    for target in ("victim.source:gone", "victim.source:Counter.gone", "victim.nowhere:add"):
        bad = Patch("bad", target, "a reason", replace=1, fingerprints={"unversioned": "0"})
        with pytest.raises(UserError, match="bad.*is missing"):
            patching.apply([good, bad])
        assert source.add(1, 2) == 3 and patching.applied() == []


def test_a_changed_source_fails_closed(package):
    source, _ = package
    stale = Patch("stale", "victim.source:add", "a reason", wrap=doubled, fingerprints={"unversioned": "000000000000"})
    with pytest.raises(UserError, match="not what the patch was written against"):
        patching.apply([stale])
    assert source.add(1, 2) == 3


def test_an_unlisted_version_passes_only_with_a_known_source(package):
    source, _ = package
    elsewhere = {"9.9": fingerprint(source.add)}
    patching.apply([Patch("same", "victim.source:add", "a reason", wrap=doubled, fingerprints=elsewhere)])
    assert source.add(1, 2) == 6
    with pytest.raises(UserError, match="is wrong"):
        patching.apply([Patch("other", "victim.source:Counter", "a reason", replace=1, fingerprints=elsewhere)])


@pytest.mark.parametrize("second", ["add", "Counter"])
def test_two_patches_of_one_thing_are_an_error_naming_both(package, second):
    source, _ = package
    first = patch(source, "add" if second == "add" else "Counter.step", "first", replace=lambda *a: 1)
    other = patch(source, second, "second", wrap=lambda original: original)
    with pytest.raises(UserError, match="first and second"):
        patching.apply([first, other])
    patching.apply([first])
    with pytest.raises(UserError, match="first and second"):
        patching.apply([other])


def test_why_says_what_where_and_the_reason(package):
    source, _ = package
    patching.apply([patch(source, "add", wrap=doubled)])
    text = patching.why("patch")
    assert "wraps victim.source:add" in text and "victim.user.plus" in text and "a reason" in text
    with pytest.raises(UserError, match="not in force; legal: patch"):
        patching.why("other")


def test_a_patch_must_say_what_it_does_and_against_what():
    with pytest.raises(ValueError, match="exactly one"):
        Patch("x", "a:b", "why", fingerprints={"1": "0"})
    with pytest.raises(ValueError, match="no fingerprint"):
        Patch("x", "a:b", "why", replace=1)
    with pytest.raises(ValueError, match="must read"):
        Patch("x", "a.b", "why", replace=1, fingerprints={"1": "0"})
