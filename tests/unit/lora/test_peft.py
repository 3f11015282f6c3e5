"""Adapters of every kind of linear in PEFT's format: one function beside the base, merged, and in peft."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_llm.checkpoint.detect import open_source
from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError
from mindspeed_llm.lora.peft_format import read_peft, write_peft
from mindspeed_llm.lora.tensors import PartAdapter, adapted_places
from mindspeed_llm.plan.adapters import AdapterSettings
from mindspeed_llm.plan.targets import resolve_pattern, resolve_targets

TOLERANCE = 1e-5
EXPERTS = dict(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
MODELS = {
    "llama": {"num_hidden_layers": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 80, "mlp_only_layers": [1]},
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_hidden_layers": 2, "num_local_experts": 4},
    "deepseek_v2": {"num_hidden_layers": 2, "q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": {"num_hidden_layers": 2},
}
PARTS = {
    "llama": "q_proj v_proj down_proj",
    "mixtral": "q_proj w1 w2",
    "deepseek_v3": "q_a_proj kv_b_proj gate_proj up_proj gate",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(model_type):
        if model_type not in made:
            directory = tmp_path_factory.mktemp("base") / model_type
            made[model_type] = make_toy(model_type, directory, **MODELS[model_type])
        return made[model_type]

    return base


def random_adapters(shape, words, *, ranks=None, alphas=None, rslora=False):
    """Settings and adapters that change the logits."""
    resolved = resolve_targets(words.split(), shape)
    patterns = [resolve_pattern(p or {}, shape, resolved, what=w) for p, w in ((ranks, "rank"), (alphas, "alpha"))]
    settings = AdapterSettings(4, 12.0, 0.1, resolved.targets, resolved.layers, *patterns, use_rslora=rslora)
    generator, tensors = torch.Generator().manual_seed(11), {}
    for place in adapted_places(shape, settings):
        shared = None
        for part in place.parts:
            width, out = place.linear.parts[part]
            rank = settings.rank_of(place.linear.module, part)
            a, b = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
            shared = a if shared is None else shared
            a = shared if place.shares_a else a
            tensors[place.path, part] = PartAdapter(a * 0.1, b * 0.02)
    return settings, tensors


def distance(found, expected):
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))


def check_all_ways(base, directory, our_logits, hf_logits, convert_door, out):
    convert_door(f"--load-dir {base} --lora-load {directory} --save-model-type hf --save-dir {out}")
    beside = our_logits(base, directory)
    others = {
        "merged in memory": our_logits(base, directory, merge=True),
        "in peft": hf_logits(base, directory),
        "merged on disk": hf_logits(out),
    }
    assert {name: d for name, logits in others.items() if (d := distance(logits, beside)) > TOLERANCE} == {}
    assert distance(our_logits(base), beside) > 1e-2, "the adapters do nothing, so nothing was compared"
    return beside


@pytest.mark.parametrize("model_type", MODELS)
def test_adapters_on_every_linear_are_the_same_function_everywhere(
    model_type, bases, our_logits, hf_logits, convert_door, tmp_path
):
    base = bases(model_type)
    shape = open_source(base).shape
    router = " all-router" if shape.num_moe_experts else ""
    settings, tensors = random_adapters(shape, "all-linear" + router)
    write_peft(tmp_path / "peft", tensors, settings, shape, str(base))
    check_all_ways(base, tmp_path / "peft", our_logits, hf_logits, convert_door, tmp_path / "merged")


@pytest.mark.parametrize("model_type", PARTS)
def test_parts_with_ranks_and_scalings_of_their_own(model_type, bases, our_logits, hf_logits, convert_door, tmp_path):
    base = bases(model_type)
    shape = open_source(base).shape
    words = PARTS[model_type]
    ranks, alphas = {words.split()[0]: 2, words.split()[2]: 6}, {words.split()[2]: 5.0}
    settings, tensors = random_adapters(shape, words, ranks=ranks, alphas=alphas, rslora=True)
    write_peft(tmp_path / "peft", tensors, settings, shape, str(base))
    check_all_ways(base, tmp_path / "peft", our_logits, hf_logits, convert_door, tmp_path / "merged")


def test_adapters_of_embedding_and_output_layer(bases, our_logits, hf_logits, convert_door, tmp_path):
    base = bases("llama")
    shape = open_source(base).shape
    settings, tensors = random_adapters(shape, "embed_tokens lm_head q_proj")
    write_peft(tmp_path / "peft", tensors, settings, shape, str(base))
    convert_door(
        f"--load-dir {base} --lora-load {tmp_path / 'peft'} --save-model-type hf --save-dir {tmp_path / 'merged'}"
    )
    expected = hf_logits(base, tmp_path / "peft")
    assert distance(hf_logits(tmp_path / "merged"), expected) < TOLERANCE < 1e-2 < distance(our_logits(base), expected)
    assert distance(our_logits(base, tmp_path / "peft"), expected) < TOLERANCE
    assert distance(our_logits(base, tmp_path / "peft", merge=True), expected) < TOLERANCE


def test_an_adapter_of_a_tied_embedding_is_refused(convert_door, tmp_path):
    base = make_toy("qwen2", tmp_path / "base", num_hidden_layers=2, tie_word_embeddings=True)
    shape = open_source(base).shape
    settings, tensors = random_adapters(shape, "embed_tokens")
    write_peft(tmp_path / "peft", tensors, settings, shape, None)
    with pytest.raises(UserError, match="changes the input alone"):
        convert_door(f"--load-dir {base} --lora-load {tmp_path / 'peft'} --save-dir {tmp_path / 'x'}")


def test_another_base_than_the_recorded_one_is_refused(tuned, convert_door, our_logits, tmp_path):
    """Directories that we wrote know their base."""
    base, adapters = tuned("toy_llama", "parts")
    convert_door(f"--load-dir {base} --lora-load {adapters} --save-lora-to-hf --save-dir {tmp_path / 'peft'}")
    other = make_toy("llama", tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="is not the base that .* was trained on"):
        our_logits(other, tmp_path / "peft")


def test_experts_of_transformers_4_are_read(bases, hf_logits, our_logits, tmp_path):
    """A directory with a linear for each expert, which peft turns into stacked parameters itself."""
    base = bases("qwen3_moe")
    shape = open_source(base).shape
    settings, tensors = random_adapters(shape, "gate_proj up_proj down_proj")
    write_one_by_one(tmp_path, shape, settings, tensors)
    read, found = read_peft(tmp_path, shape)
    assert found.targets == settings.targets
    assert all(torch.equal(read[place].b, tensors[place].b) for place in tensors)
    assert distance(our_logits(base, tmp_path), hf_logits(base, tmp_path)) < TOLERANCE


def write_one_by_one(directory, shape, settings, tensors, magnitudes=None):
    """As peft wrote adapters of experts that were modules; `magnitudes` draws those of a number of outputs (DoRA)."""
    one_by_one = {}
    for place in adapted_places(shape, settings):
        for part in place.parts:
            path = "base_model.model." + place.linear.hf_path(part, place.layer, place.expert)
            one_by_one[f"{path}.lora_A.weight"] = tensors[place.path, part].a.contiguous()
            one_by_one[f"{path}.lora_B.weight"] = tensors[place.path, part].b.contiguous()
            if magnitudes is not None:
                one_by_one[f"{path}.lora_magnitude_vector.weight"] = magnitudes(place.linear.parts[part][1])
    save_file(one_by_one, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    record = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12}
    record |= {"target_modules": ["gate_proj", "up_proj", "down_proj"], "use_dora": magnitudes is not None}
    (directory / "adapter_config.json").write_text(json.dumps(record))


def test_magnitudes_of_experts_of_transformers_4_are_read(bases, our_logits, tmp_path):
    """What peft cannot say with transformers 5: beside the experts and merged into them they are one function."""
    base = bases("qwen3_moe")
    shape = open_source(base).shape
    settings, tensors = random_adapters(shape, "gate_proj up_proj down_proj")
    generator = torch.Generator().manual_seed(2)
    write_one_by_one(tmp_path, shape, settings, tensors, lambda out: 1 + torch.rand(out, generator=generator))
    beside = our_logits(base, tmp_path)
    assert distance(our_logits(base, tmp_path, merge=True), beside) < TOLERANCE
    write_one_by_one(tmp_path, shape, settings, tensors)
    assert distance(our_logits(base, tmp_path), beside) > 1e-2


def test_what_is_written_is_read_back_to_the_bit(bases, tmp_path):
    shape = open_source(bases("deepseek_v3")).shape
    settings, tensors = random_adapters(shape, "linear_proj experts.linear_fc1 experts.linear_fc2 router")
    write_peft(tmp_path, tensors, settings, shape, None)
    read, found = read_peft(tmp_path, shape)
    assert found.targets == settings.targets and read.keys() == tensors.keys()
    assert all(torch.equal(read[p].a, tensors[p].a) and torch.equal(read[p].b, tensors[p].b) for p in tensors)


def test_experts_in_another_order_are_noticed(bases, our_logits, hf_logits, tmp_path):
    """The comparison with peft would see B with its experts where the ranks belong."""
    base = bases("qwen3_moe")
    shape = open_source(base).shape
    settings, tensors = random_adapters(shape, "experts.linear_fc2")
    write_peft(tmp_path, tensors, settings, shape, None)
    expected = hf_logits(base, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name in [name for name in stored if "lora_B" in name]:
        stored[name] = stored[name].unflatten(1, (4, 4)).transpose(1, 2).flatten(1).contiguous()
    save_file(stored, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    assert distance(our_logits(base, tmp_path), expected) > 1e-3


def test_half_of_stacked_experts_is_refused(bases, convert_door, tmp_path):
    base = bases("qwen3_moe")
    shape = open_source(base).shape
    settings, tensors = random_adapters(shape, "experts.linear_fc2")
    write_peft(tmp_path / "peft", tensors, settings, shape, None)
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    del stored["base_model.model.model.layers.1.mlp.experts.lora_B.weight"]
    save_file(stored, tmp_path / "peft" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="has only model.layers.1.mlp.experts.lora_A.weight"):
        convert_door(f"--load-dir {base} --lora-load {tmp_path / 'peft'} --save-dir {tmp_path / 'x'}")


def test_prediction_layers_cannot_be_exported(tmp_path):
    base = make_toy("deepseek_v3", tmp_path / "base", num_hidden_layers=2, num_nextn_predict_layers=1)
    shape = open_source(base).shape
    settings, tensors = random_adapters(shape, "eh_proj")
    with pytest.raises(UserError, match="mtp.layers.0.eh_proj has an adapter"):
        write_peft(tmp_path / "peft", tensors, settings, shape, None)
    assert not (tmp_path / "peft").exists()
