"""What a patch meets in another version is read from files: the same, changed with a difference, or missing."""

import importlib
import textwrap

from mindspeed_llm.patching import Patch, fingerprint
from mindspeed_llm.patching.drift import CHANGED, MISSING, SAME, drift, has_needs, source_in

SOURCE = """
import functools

class Counter:
    @functools.cache
    def step(self):
        return 1

try:
    import nowhere
except ImportError:
    def add(a, b):
        return a + b
"""


def write(root, text):
    folder = root / "victim_of_drift"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "source.py").write_text(textwrap.dedent(text))
    return root


def test_the_fingerprint_of_a_file_is_that_of_the_imported_object(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(write(tmp_path, SOURCE)))
    module = importlib.import_module("victim_of_drift.source")
    step = vars(module.Counter)["step"].__wrapped__
    for target, value in (("add", module.add), ("Counter.step", step), ("Counter", module.Counter)):
        patch = Patch("p", f"victim_of_drift.source:{target}", "why", replace=1, fingerprints={"1": fingerprint(value)})
        assert [each.state for each in drift([patch], tmp_path)] == [SAME], source_in(tmp_path, patch)


def test_changes_come_with_a_difference_and_absence_is_said(tmp_path):
    old = write(tmp_path / "old", SOURCE)
    new = write(tmp_path / "new", SOURCE.replace("return a + b", "return b + a"))
    patches = [
        Patch("add", "victim_of_drift.source:add", "why", replace=1, fingerprints={"1": "000000000000"}),
        Patch("gone", "victim_of_drift.source:gone", "why", replace=1, fingerprints={"1": "0"}),
        Patch("nowhere", "victim_of_drift.nowhere:add", "why", replace=1, fingerprints={"1": "0"}),
    ]
    changed, gone, nowhere = drift(patches, new, old)
    assert changed.state == CHANGED and changed.summary == "+1 -1" and "+        return b + a" in changed.difference
    assert gone.state == nowhere.state == MISSING


def test_a_package_that_a_version_lacks_excuses_its_modules_and_no_others(tmp_path):
    root = write(tmp_path, SOURCE)
    (root / "victim_of_drift" / "part").mkdir()

    def concerns(module, needs):
        patch = Patch("p", f"{module}:load", "why", replace=1, fingerprints={"1": "0"}, needs=needs)
        assert [each.state for each in drift([patch], root)] == [MISSING]
        return has_needs(root, patch)

    assert not concerns("victim_of_drift.absent.kernels", "victim_of_drift.absent")
    assert concerns("victim_of_drift.part.renamed", "victim_of_drift.part")
    assert concerns("victim_of_drift.renamed", "no_such_package")
    assert concerns("victim_of_drift.renamed", "")
