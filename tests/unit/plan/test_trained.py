"""What is trained of a model: which parameters, what that costs, and what is refused before anything starts."""

import pytest

from mindspeed_llm.config.parser import parse
from mindspeed_llm.config.training import TrainingConfig
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.plan import resolve
from mindspeed_llm.plan.show import plan_memory
from mindspeed_llm.plan.trained import TrainedParts, parse_layers


@pytest.mark.parametrize(
    "text, layers",
    [("first:2", {0, 1}), ("last:3", {5, 6, 7}), ("1,4-6", {1, 4, 5, 6}), ("7", {7}), ("first:8", set(range(8)))],
)
def test_layers_are_parsed(text, layers):
    assert parse_layers(text, 8, "--frozen-layers") == layers


@pytest.mark.parametrize("text", ["first:9", "middle:2", "8", "3-1", "a", "last:0", "1,,2"])
def test_wrong_layers_are_refused(text):
    with pytest.raises(UserError, match="--frozen-layers: .* is wrong; legal: first:N"):
        parse_layers(text, 8, "--frozen-layers")


NAMES = ["embedding.word_embeddings.weight", *(f"decoder.layers.{i}.mlp.linear_fc1.weight" for i in range(4)), "head"]


def trained(adapted=False, **options):
    parts = TrainedParts.of(TrainingConfig(**options), 4, adapted=adapted)
    return [number for number, name in enumerate(NAMES) if parts.has(name)]


def test_selections_combine():
    assert trained() == [0, 1, 2, 3, 4, 5]
    assert trained(trainable_layers="last:2") == [3, 4]
    assert trained(frozen_layers="first:2") == [0, 3, 4, 5]
    assert trained(trainable=["linear_fc1"], frozen_layers="0") == [2, 3, 4]
    assert trained(freeze=[r"layers\.[12]\.", "head"]) == [0, 1, 4]
    assert trained(adapted=True) == []
    assert trained(adapted=True, trainable=["head"]) == [5]


def test_an_expert_is_known_by_its_own_name_and_by_its_stack():
    expert = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight"
    assert TrainedParts(trainable=(r"experts\.weight2",)).has_tensor(expert)
    assert TrainedParts(trainable=(r"local_experts\.3\.",)).has_tensor(expert)
    assert not TrainedParts(trainable=(r"experts\.weight1",)).has_tensor(expert)
    assert not TrainedParts(freeze=(r"experts\.weight2",)).has_tensor(expert)
    assert not TrainedParts(freeze=(r"local_experts\.3\.",)).has_tensor(expert)


def plan_of(directory, *words):
    parsed = parse("posttrain", ["--load", str(directory), "--data-path", "none", "--seq-length", "64", *words])
    return resolve(parsed.config, parsed.problems)


def numel(shape, part):
    """Parameters of the model whose names hold a word."""
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.parallel.setup import initialize_distributed

    initialize_distributed()
    model = build_model(shape, BuildOptions(initialize=False, padded_vocab_size=shape.vocab_size))
    return sum(p.numel() for name, p in model.named_parameters() if part in name)


@pytest.mark.parametrize(
    "words, part",
    [
        ([], ""),
        (["--trainable-layers", "last:1"], ".layers.3."),
        (["--trainable", "output_layer"], "output_layer"),
        (["--freeze", "embedding", "output_layer", "final_"], ".layers."),
    ],
)
def test_the_plan_counts_gradients_and_states_of_what_is_trained(words, part, toy_llama):
    plan = plan_of(toy_llama, *words, "--make-vocab-size-divisible-by", "1")
    expected, estimate = numel(plan.shape, part), plan_memory(plan)
    assert plan.trainable_parameters() == expected
    assert (estimate.gradients, estimate.optimizer) == (4 * expected, 8 * expected)
    assert estimate.weights == 4 * plan.shape.num_parameters()
    assert estimate.total <= plan_memory(plan_of(toy_llama)).total


def test_what_is_trained_beside_adapters_counts_too(toy_llama):
    alone = plan_of(toy_llama, "--lora-r", "4")
    beside = plan_of(toy_llama, "--lora-r", "4", "--trainable", "output_layer")
    head = numel(alone.shape, "output_layer")
    assert beside.trainable_parameters() == alone.trainable_parameters() + head
    padded = plan_memory(beside).gradients - plan_memory(alone).gradients
    assert padded == 4 * head * beside.padded_vocab_size // beside.shape.vocab_size


@pytest.mark.parametrize(
    "words, said",
    [
        (["--trainable", "no_such"], "--trainable/--freeze: 'no_such' matches no parameter; names look like"),
        (["--freeze", "("], "--freeze: '\\(' is no regular expression: missing"),
        (["--freeze", "."], "training: every parameter is frozen; leave something to train"),
        (["--frozen-layers", "first:9"], "--frozen-layers: 'first:9' is wrong"),
    ],
)
def test_a_selection_that_means_nothing_is_refused_by_the_plan(words, said, toy_llama):
    with pytest.raises(UserError, match=said):
        plan_of(toy_llama, *words)
