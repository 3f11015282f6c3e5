"""Names and expressions that `--lora-target-modules` and its patterns take, and what they are adapters of."""

import json
import re

import pytest

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.config.parser import parse
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config import shape_from_hf
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.plan import resolve
from mindspeed_llm.plan.targets import Resolved, resolve_pattern, resolve_targets

SHAPE = ModelShape("llama", 3, 48, 80, 6, 2, 12, 131, 256)
WHOLE = {"linear_qkv": (), "linear_proj": (), "linear_fc1": (), "linear_fc2": ()}


@pytest.mark.parametrize(
    "words, targets",
    [
        (["linear_qkv"], {"linear_qkv": ()}),
        (["self_attention.linear_qkv"], {"linear_qkv": ()}),
        (["q_proj", "k_proj", "v_proj"], {"linear_qkv": ("q_proj", "k_proj", "v_proj")}),
        (["v_proj", "q_proj"], {"linear_qkv": ("q_proj", "v_proj")}),
        (["o_proj", "down_proj"], {"linear_proj": (), "linear_fc2": ()}),
        (["linear_fc1", "q_proj"], {"linear_qkv": ("q_proj",), "linear_fc1": ()}),
        (["all-linear"], WHOLE),
        (["wq", "wv"], {"linear_qkv": ("q_proj", "v_proj")}),
        (["attention.wk", "wo"], {"linear_qkv": ("k_proj",), "linear_proj": ()}),
        (["w1", "w2", "w3"], {"linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": ()}),
        ([r".*wq|.*wk|.*wv|.*wo"], {"linear_qkv": ("q_proj", "k_proj", "v_proj"), "linear_proj": ()}),
        ([r"model\.layers\.\d+\.self_attn\.(q|v)_proj"], {"linear_qkv": ("q_proj", "v_proj")}),
        ([r".*self_attention\.linear_.*"], {"linear_qkv": (), "linear_proj": ()}),
        (["lm_head", "embed_tokens"], {"word_embeddings": (), "output_layer": ()}),
    ],
)
def test_targets(words, targets):
    assert resolve_targets(words, SHAPE) == Resolved(targets, {})


@pytest.mark.parametrize(
    "words, layers",
    [
        (["layers.1.self_attn.q_proj"], (1,)),
        (["decoder.layers.2.self_attention.linear_qkv"], (2,)),
        ([r".*layers\.[01]\..*q_proj"], (0, 1)),
        ([r".*layers\.(0|2)\.attention\.wq"], (0, 2)),
    ],
)
def test_words_may_mean_some_layers(words, layers):
    assert resolve_targets(words, SHAPE).layers == {"linear_qkv": layers}


def test_layers_to_transform():
    assert resolve_targets(["q_proj"], SHAPE, layers_to_transform=[2, 0]).layers == {"linear_qkv": (0, 2)}
    assert resolve_targets(["q_proj"], SHAPE, layers_to_transform=[0, 1, 2]).layers == {}
    with pytest.raises(UserError, match="--lora-layers-to-transform: 3 is wrong, .* legal: 0 to 2"):
        resolve_targets(["q_proj"], SHAPE, layers_to_transform=[3])


def test_what_is_excluded_is_left_out():
    found = resolve_targets(["all-linear"], SHAPE, exclude=["k_proj", "linear_proj"])
    assert found.targets == {"linear_qkv": ("q_proj", "v_proj"), "linear_fc1": (), "linear_fc2": ()}
    with pytest.raises(UserError, match="all excluded"):
        resolve_targets(["o_proj"], SHAPE, exclude=["linear_proj"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["w_proj"], "target 'w_proj' matches no linear of this model; legal: .*linear_qkv, .*q_proj.*, all-linear"),
        (["q_proj", "proj"], "target 'proj' matches no linear"),
        (["all-router"], "target 'all-router' matches no linear"),
        (["linear_qkv", "q_proj"], "target 'q_proj' is already inside 'linear_qkv'"),
        (["all-linear", "up_proj"], "target 'up_proj' is already inside 'all-linear'"),
        (["query_key_value"], "matches no linear"),
        (["(q_proj"], r"pattern '\(q_proj' is wrong, because it is no regular expression"),
        (["q_proj", "layers.1.self_attn.v_proj"], "q_proj of linear_qkv in layer 0 and q_proj, v_proj in layer 1"),
    ],
)
def test_wrong_targets_are_refused(words, message):
    with pytest.raises(UserError, match=message) as refused:
        resolve_targets(words, SHAPE)
    assert "\n" not in str(refused.value)


def test_a_model_with_experts_has_a_router_and_expressions_take_all_experts(tmp_path):
    made = make_toy("qwen3_moe", tmp_path / "moe")
    shape = shape_from_hf(json.loads((made / "config.json").read_text()))
    assert resolve_targets(["all-router"], shape).targets == {"router": ()}
    assert "router" not in resolve_targets(["all-linear"], shape).targets
    assert resolve_targets(["experts.linear_fc1"], shape).targets.keys() >= {"experts.linear_fc1"}
    with pytest.raises(UserError, match="of some experts of layer . alone; legal: all experts"):
        resolve_targets([r".*experts\.0\.gate_proj"], shape)


RESOLVED = resolve_targets(["q_proj", "v_proj", "linear_fc1"], SHAPE)


@pytest.mark.parametrize(
    "pattern, values",
    [
        ({"q_proj": 8}, {"linear_qkv/q_proj": 8}),
        ({"linear_qkv": 8}, {"linear_qkv": 8}),
        ({"wv": 8, "linear_qkv": 2}, {"linear_qkv/q_proj": 2, "linear_qkv/v_proj": 8}),
        ({r".*attn\..*": 8, "v_proj": 8}, None),
        ({rf"layers.{i}.self_attn.q_proj": 3 for i in range(3)}, {"linear_qkv/q_proj": 3}),
        ({"gate_proj": 3, "up_proj": 3}, {"linear_fc1": 3}),
    ],
)
def test_ranks_by_pattern(pattern, values):
    """The first that matches counts, as in PEFT; one that never counts is a mistake."""
    if values is None:
        with pytest.raises(UserError, match="rank pattern 'v_proj' matches no adapter, or none that is left"):
            resolve_pattern(pattern, SHAPE, RESOLVED, what="rank")
    else:
        assert resolve_pattern(pattern, SHAPE, RESOLVED, what="rank") == values


@pytest.mark.parametrize(
    "pattern, message",
    [
        ({"gate_proj": 3}, "rank of gate_proj is wrong, because all of linear_fc1 has one adapter"),
        ({"o_proj": 3}, "rank pattern 'o_proj' matches no adapter.*legal: linear_qkv, linear_fc1, q_proj, v_proj"),
        ({r"layers\.0\..*": 3}, "of some layers or experts alone; legal: one rank for a linear in all its layers"),
    ],
)
def test_wrong_patterns_are_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        resolve_pattern(pattern, SHAPE, RESOLVED, what="rank")


def test_names_that_are_legal_are_listed_once(tmp_path):
    """Dense layers, experts and shared experts have parts of the same names."""
    made = make_toy("deepseek_v3", tmp_path / "toy")
    shape = shape_from_hf(json.loads((made / "config.json").read_text()))
    targets = resolve_targets(["gate_proj", "up_proj"], shape)
    assert len(targets.targets) > 1
    for ask in (
        lambda: resolve_pattern({"nothing": 3}, shape, targets, what="rank"),
        lambda: resolve_targets(["nothing"], shape),
    ):
        with pytest.raises(UserError) as refused:
            ask()
        names = str(refused.value).partition("legal: ")[2].split(", ")
        assert len(names) == len(set(names)) and {*targets.targets, "gate_proj", "up_proj"} <= set(names)


def test_parts_that_share_a_may_differ_in_alpha():
    assert resolve_pattern({"gate_proj": 3.0}, SHAPE, RESOLVED, what="alpha") == {"linear_fc1/gate_proj": 3.0}


def test_peft_finds_the_same_linears(toy_llama):
    """What a list of names, a regular expression and patterns mean on the model of transformers, by peft itself."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = shape_from_hf(json.loads((toy_llama / "config.json").read_text()))
    cases = [
        dict(target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}),
        dict(target_modules=r".*layers\.[02]\..*(v|o)_proj", rank_pattern={r".*\.o_proj": 2}),
        dict(target_modules=["self_attn.q_proj", "up_proj"], layers_to_transform=[1]),
        dict(target_modules=["gate_proj", "up_proj"], rank_pattern={"mlp.up_proj": 3, "up_proj": 5}),
    ]
    for case in cases:
        with torch.device("meta"):
            model = get_peft_model(
                AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(toy_llama)), LoraConfig(r=4, **case)
            )
        theirs = {
            name.removeprefix("base_model.model.").partition(".lora_A")[0]: parameter.shape[0]
            for name, parameter in model.named_parameters()
            if ".lora_A" in name
        }
        words = case["target_modules"]
        resolved = resolve_targets(
            [words] if isinstance(words, str) else words, shape, layers_to_transform=case.get("layers_to_transform")
        )
        ranks = resolve_pattern(case.get("rank_pattern", {}), shape, resolved, what="rank", all_used=False)
        assert ours(shape, resolved, ranks) == theirs, case


def ours(shape, resolved, ranks):
    """Path of Hugging Face's linear -> rank."""
    from mindspeed_llm.plan.adaptable import adaptable_modules

    found = {}
    for module, parts in resolved.targets.items():
        linear = adaptable_modules(shape)[module]
        for layer in resolved.layers.get(module, linear.layers):
            for part in parts or linear.parts:
                rank = ranks.get(f"{module}/{part}", ranks.get(module, 4))
                found[linear.hf_path(part, layer)] = rank
    return found


def plan_of(load, *flags):
    parsed = parse("posttrain", ["--load", str(load), "--stage", "sft", "--prompt-type", "chatml", *flags])
    return resolve(parsed.config, parsed.problems)


def test_the_table_names_linears_and_what_is_trained(toy_llama, capsys):
    from mindspeed_llm.plan.show import show_plan

    flags = "--lora-target-modules wq wv linear_fc2 --lora-r 4 --lora-rank-pattern wv=2 --use-rslora".split()
    plan = plan_of(toy_llama, *flags)
    show_plan(plan)
    out = capsys.readouterr().out
    assert re.search(r"linear_qkv\W+q_proj v_proj\W+4\W+4 2\W", out), out
    assert re.search(r"linear_fc2\W+one A for all\W+4\W+4\W", out), out
    assert f"trained: {plan.trainable_parameters():,} parameters" in out
    assert "alpha 32 / sqrt(rank)" in out


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lora-target-modules c_attn", "target 'c_attn' matches no linear of this model"),
        ("--lora-r 4 --lora-rank-pattern lm_head=2", "rank pattern 'lm_head' matches no adapter"),
        ("--lora-rank-pattern q_proj=2 --use-dora", "--lora-rank-pattern, --use-dora: no meaning without --lora-r"),
        ("--lora-r 4 --lora-exclude-modules c_attn", "--lora-exclude-modules: 'c_attn' matches no linear"),
        ("--loraplus-lr-ratio 4", "--loraplus-lr-ratio: no meaning without --lora-r"),
        ("--lora-r 4 --lora-layers-to-transform 9", "--lora-layers-to-transform: 9 is wrong"),
    ],
)
def test_wrong_options_are_refused_by_the_plan(flags, message, toy_llama):
    with pytest.raises(UserError, match=message):
        plan_of(toy_llama, *flags.split())
