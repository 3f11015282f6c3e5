"""Features that save memory or time train what a run without them trains, alone and in pairs, over layouts.

memory_features.yaml says what they are. A pair runs in one of the layouts that both have, so chosen that each feature
meets all of its own. It is compared with the plain run of that layout; where one of the two reorders a sum, with that
one alone, so that the other must still give the same bits.
"""

import ast
import functools
import json
from collections import Counter
from contextlib import nullcontext
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import yaml

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError
from mindspeed_llm.testing.layouts import compare, make_rows, train
from mindspeed_llm.testing.pool import pool

ROOT = Path(__file__).parents[2]
TABLE = yaml.safe_load(Path(__file__).with_name("memory_features.yaml").read_text(encoding="utf-8"))
LAYOUTS, MODELS, FEATURES = TABLE["layouts"], TABLE["models"], TABLE["features"]
HERE = [name for name, feature in FEATURES.items() if "refused" not in feature]
# Four micro-batches; two on each of two data-parallel ranks. AdamW divides by |gradient| + eps: a large eps keeps it
# from making a whole step of the rounding of a gradient that is almost zero.
ROWS = make_rows(4, vocab_size=331, longest=24, equal=True)
STEPS = "--lr 1e-3 --adam-eps 1e-3"
# Toys have no tensor of a megabyte.
SMALL = 1024
ROUNDING = 1e-6
# Spread of the toys' weights.
DRAWN = 0.1
# How many visits too many of a layout save a run that has nothing else to be compared with.
NEW_RUN = 12


class Case(NamedTuple):
    """Features that are on together, and where."""

    features: tuple[str, ...]
    model: str
    layout: str

    def __str__(self):
        return f"{' + '.join(self.features)} [{self.model} {self.layout}]"


def options(*texts):
    """{flag: its value} of command lines; None if they contradict each other."""
    found = {}
    for text in texts:
        for item in f" {text}".split(" --")[1:]:
            flag, _, value = item.partition(" ")
            if found.setdefault(flag, value.strip()) != value.strip():
                return None
    return found


def flags_of(names, which=("beside", "flags")):
    return " ".join(FEATURES[name].get(part, "") for name in names for part in which)


def refusal(one, other):
    """What is said about a pair that is refused; None for the others."""
    return FEATURES[one].get("excludes", {}).get(other) or FEATURES[other].get("excludes", {}).get(one)


def acting(names):
    """Those of the features that a plain run does not have."""
    return [name for name in names if "flags" in FEATURES[name]]


def is_pair(one, other):
    """Whether both can be on, and say different things that can be compared."""
    if options(flags_of([one, other])) is None or refusal(one, other) or "alone" in FEATURES[one] | FEATURES[other]:
        return False
    same = any(
        options(FEATURES[a].get("flags", "")).items() <= options(FEATURES[b].get("beside", "")).items()
        for a, b in ((one, other), (other, one))
        if a in acting([a])
    )
    roundings = len(acting([one, other])) < 2 and "reorders" in FEATURES[one] | FEATURES[other]
    return not same and not roundings and bool(acting([one, other]))


def layouts_of(name):
    return FEATURES[name].get("layouts", list(LAYOUTS))


def places(names):
    """(model, layout) where all of the features mean something."""
    for model, layout in product(MODELS, LAYOUTS):
        fits = model in (LAYOUTS[layout][2:] or [list(MODELS)])[0]
        if fits and all(model in FEATURES[n].get("models", MODELS) and layout in layouts_of(n) for n in names):
            yield model, layout


def reordering(names):
    """Those of the features that add in another order."""
    return [name for name in names if "reorders" in FEATURES[name]]


def compared_with(names):
    """Options of the run that must give the same: without the features, or without those that reorder nothing."""
    kept = reordering(names) if len(reordering(names)) < len(acting(names)) else ()
    return tuple(sorted(options(flags_of(names, ("beside",)), flags_of(kept, ("flags",))).items()))


def choose_cases():
    """Every feature and pair once, where its features have been least so far and the other run is there already."""
    met, known = Counter(), set()
    for names in [*((name,) for name in acting(HERE)), *filter(lambda pair: is_pair(*pair), combinations(HERE, 2))]:
        other = compared_with(names)

        def visits(place):
            seen = sum(3 * met[n, place[1]] + met[n, place[0]] for n in names)  # noqa: B023
            return seen + NEW_RUN * ((place, other) not in known)  # noqa: B023

        place = min(places(names), key=visits, default=None)
        if place is not None:
            met.update((name, where) for name in names for where in place)
            known.add((place, other))
            yield Case(names, *place)


CASES = sorted(choose_cases(), key=lambda case: (LAYOUTS[case.layout][0], list(LAYOUTS).index(case.layout), case.model))


class Run(NamedTuple):
    """What a run gave on one rank.

    Attributes:
        swapped: bytes that left the device on this rank.
        state: bytes of this rank's optimizer state.
        saved: checksum of every file of tensors of its checkpoints.
    """

    trained: object
    swapped: int
    state: int
    saved: dict[str, str]


def run_here(model, flags, folder, tamper=None):
    """Two steps on this rank of a pool; the fields of a `Run`."""
    from mindspeed_llm.testing import layouts
    from mindspeed_llm.training import setup
    from mindspeed_llm.training.run import make_optimizer
    from mindspeed_llm.training.swapping import swap_activations

    swaps, optimizers = [], []

    def swap_small(plan, chunks):
        swap = swap_activations(plan, chunks)
        if swap is not None:
            swap.small = SMALL
        swaps.append(swap)
        return swap

    def remember(*arguments):
        made = make_optimizer(*arguments)
        optimizers.append(made[0])
        return made

    with (
        mock.patch.object(setup, "swap_activations", swap_small),
        mock.patch.object(layouts, "make_optimizer", remember),
        TAMPERINGS[tamper]() if tamper else nullcontext(),
    ):
        trained = train(model, flags.format(save=folder), ROWS, 2, "adamw")
    manifests = {path.parent.name: json.loads(path.read_text()) for path in Path(folder).glob("iter_*/manifest.json")}
    saved = {f"{at}/{name}": entry for at, made in manifests.items() for name, entry in made["files"].items()}
    saved = {name: entry for name, entry in saved.items() if name.endswith(".distcp")}
    return trained, swaps[0].swapped_bytes if swaps[0] else 0, state_bytes(optimizers[0]), saved


def state_bytes(optimizer):
    from mindspeed_llm.checkpoint.optimizer_state import optimizer_parts

    states = [state for part in optimizer_parts(optimizer) for state in part.optimizer.state.values()]
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def one_row_off():
    """What swap brings back is shifted by a row."""
    from mindspeed_llm.memory.swapped import SavedView

    tensor = SavedView.tensor
    return mock.patch.object(SavedView, "tensor", lambda self: tensor(self).roll(1, 0))


def recomputed_as_zero():
    """What was dropped is not computed again."""
    from megatron.core.tensor_parallel import CheckpointWithoutOutput

    original = CheckpointWithoutOutput._recompute

    def forgetful(self, gradient):
        outputs = self.outputs
        original(self, gradient)
        for output in outputs or ():
            output.untyped_storage().fill_(0)

    return mock.patch.object(CheckpointWithoutOutput, "_recompute", forgetful)


def first_chunk_of_the_loss_twice():
    """The weight gradient of the first chunk of the loss is added once more."""
    from mindspeed_llm.ops import cross_entropy

    original = cross_entropy._add_product

    def twice(total, a, b, beginning):
        original(total, a, b, beginning)
        if beginning:
            original(total, a, b, False)

    return mock.patch.object(cross_entropy, "_add_product", twice)


TAMPERINGS = {
    "one row off": one_row_off,
    "recomputed as zero": recomputed_as_zero,
    "first chunk twice": first_chunk_of_the_loss_twice,
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    root = tmp_path_factory.mktemp("toys")
    small = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 331}
    latent = {**small, "num_key_value_heads": 4}
    return {
        "dense": str(make_toy("qwen2", root / "dense", tie_word_embeddings=True, **small)),
        "experts": str(make_toy("mixtral", root / "experts", num_local_experts=4, **small)),
        "latent": str(make_toy("deepseek_v3", root / "latent", **latent)),
    }


@pytest.fixture(scope="module")
def run(toys, tmp_path_factory):
    """run(model, layout, flags) -> what every rank gave; each once."""

    @functools.cache
    def once(model, layout, flags, tamper=None):
        toy, always = MODELS[model]
        words = " ".join([STEPS, always, LAYOUTS[layout][1], *(f"--{k} {v}" for k, v in flags)])
        folder = str(tmp_path_factory.mktemp("save"))
        return [Run(*found) for found in pool(LAYOUTS[layout][0]).run(run_here, toys[toy], words, folder, tamper)]

    def start(model, layout, flags, tamper=None):
        return once(model, layout, tuple(sorted(options(flags).items())), tamper)

    return start


def assert_same_bits(found, expected):
    assert (found.losses, found.norms) == (expected.losses, expected.norms)
    for ours, theirs in zip([*found.gradients, found.weights], [*expected.gradients, expected.weights], strict=True):
        assert ours.keys() == theirs.keys()
        different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        assert not different, different


def assert_rounding(found, expected):
    difference = compare(found, expected)
    assert difference.loss < ROUNDING and difference.gradient < ROUNDING, str(difference)
    assert found.norms == pytest.approx(expected.norms, rel=ROUNDING)
    for name, weight in expected.weights.items():
        # Factors that began at zero are small; the weights they are added to are not.
        size = max(float(weight.abs().max()), DRAWN)
        assert float((found.weights[name] - weight).abs().max()) < ROUNDING * size, name


def check(run, case, tamper=None):
    """Compare with that run."""
    found = run(case.model, case.layout, flags_of(case.features), tamper)
    expected = run(case.model, case.layout, " ".join(f"--{k} {v}" for k, v in compared_with(case.features)))
    if len(reordering(case.features)) < len(acting(case.features)):
        assert_same_bits(found[0].trained, expected[0].trained)
        assert found[0].saved == expected[0].saved
    else:
        assert_rounding(found[0].trained, expected[0].trained)
    if "swap" in case.features or ("swap of inputs" in case.features and case.layout != "vpp2"):
        # What a chunk is given stays, and of virtual stages of one layer that is all. The last of two stages keeps its
        # inputs too: one is the other stage's, one is needed at once.
        assert any(rank.swapped for rank in found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_trained_is_the_same(run, case):
    check(run, case)


@pytest.mark.parametrize("case, tamper", [
    (Case(("swap", "norm"), "dense", "tp2"), "one row off"),
    (Case(("norm", "activation function"), "latent", "one"), "recomputed as zero"),
    (Case(("loss by chunks", "distributed optimizer"), "dense", "dp2"), "first chunk twice"),
], ids=str)  # fmt: skip
def test_a_mistake_is_noticed(run, case, tamper):
    with pytest.raises((AssertionError, UserError)):
        check(run, case, tamper)


def test_every_feature_meets_its_layouts_and_every_pair_that_can_be():
    for name in acting(HERE):
        possible = {layout for _, layout in places([name])}
        assert {case.layout for case in CASES if name in case.features} == possible, name
    pairs = {case.features for case in CASES if len(case.features) == 2}
    for pair in combinations(HERE, 2):
        assert (pair in pairs) == (is_pair(*pair) and any(places(pair))), pair


REFUSED = [(name, None) for name in FEATURES if name not in HERE]
REFUSED += [(name, other) for name in FEATURES for other in FEATURES[name].get("excludes", {})]


@pytest.mark.parametrize("one, other", REFUSED)
def test_what_excludes_another_is_refused_in_one_line(toys, monkeypatch, one, other):
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.plan.plan import resolve

    names = [name for name in (one, other) if name]
    model, layout = next(places(names))
    toy, always = MODELS[model]
    monkeypatch.setenv("WORLD_SIZE", str(LAYOUTS[layout][0]))
    given = f"--load {toys[toy]} --train-iters 2 --global-batch-size 4 {always} {LAYOUTS[layout][1]}"
    flags = " ".join(f"--{flag} {value}" for flag, value in options(flags_of(names)).items())
    with pytest.raises(UserError) as refused:
        parsed = parse("posttrain", f"{given} {flags}".split())
        resolve(parsed.config, parsed.problems)
    said = FEATURES[one]["refused"] if other is None else FEATURES[one]["excludes"][other]
    assert [line for line in str(refused.value).splitlines() if said in line], refused.value


@pytest.mark.parametrize("name", FEATURES)
def test_what_a_feature_is_for_is_shown(name):
    path, function = FEATURES[name]["shown_by"].split("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_ranks_share_the_optimizers_state(run):
    whole, shared = (run("dense", "dp2", flags) for flags in ("", FEATURES["distributed optimizer"]["flags"]))
    assert all(rank.state == whole[0].state for rank in whole)
    assert sum(rank.state for rank in shared) < 1.05 * whole[0].state  # and padding
    assert max(rank.state for rank in shared) < 0.55 * whole[0].state
