"""A built model computes what transformers' does, in every way its forward can be called."""

import dataclasses

import pytest
import torch
import transformers

from mindspeed_llm.models import layouts, packing
from mindspeed_llm.models.build import BuildOptions, build_model, model_config
from mindspeed_llm.models.hf_config import shape_from_hf
from mindspeed_llm.models.initialize import draw
from mindspeed_llm.models.mapping import tensor_pairs
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.setup import initialize_distributed

torch.set_num_threads(1)

SIZES = dict(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES, head_dim=12),
    "llama-yarn": transformers.LlamaConfig(**SIZES, head_dim=12, rope_scaling=YARN),
    "llama-dynamic": transformers.LlamaConfig(**{**SIZES, "max_position_embeddings": 8}, rope_scaling=DYNAMIC),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=12),
    "mistral": transformers.MistralConfig(**SIZES, head_dim=12, sliding_window=5),
}


@pytest.fixture(scope="module", autouse=True)
def parallel_state():
    initialize_distributed()


def hf_model(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start at one and zero, where mistakes do not show
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model.float().eval()


def from_hf(reference):
    """Our model with the weights of a transformers model."""
    shape = shape_from_hf(reference.config.to_diff_dict() | reference.config.to_dict(), ignore_fields=())
    model = build_model(shape, BuildOptions(initialize=False))
    theirs, ours = reference.state_dict(), {}
    for pair in tensor_pairs(shape):
        parts = [theirs[name] for name in pair.hf]
        whole = parts[0] if pair.transform == "copy" else packing.pack(parts, pair.layout.packing, shape)
        ours[pair.mcore] = layouts.shard(whole, pair.mcore, shape, 0, 1, model.config.padded_vocab_size)
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert not unexpected and not [name for name in missing if not name.endswith("_extra_state")]
    return model


def ids(*shape, seed=1):
    return torch.randint(0, 131, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
    reference = hf_model(name)
    model = from_hf(reference).eval()
    with torch.no_grad():
        expected = reference(ids(2, 24)).logits
        found = model(ids(2, 24), gather_logits=True)
    assert float((found - expected).abs().max()) < 1e-4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_loss_and_gradients_are_those_of_transformers(name):
    reference = hf_model(name)
    model = from_hf(reference)
    labels = ids(2, 12, seed=2)
    labels[:, ::4] = -100
    expected = torch.nn.functional.cross_entropy(
        reference(ids(2, 12)).logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    expected.backward()
    loss = model(ids(2, 12), labels=labels)
    loss.backward()
    assert loss.dim() == 0 and float(loss) == pytest.approx(float(expected), rel=1e-6)
    theirs = dict(reference.named_parameters())
    ours = dict(model.named_parameters())
    for pair in tensor_pairs(shape_from_hf(reference.config.to_dict())):
        parts = [theirs[part].grad for part in pair.hf]
        whole = parts[0] if pair.transform == "copy" else packing.pack(parts, pair.layout.packing, model.config.shape)
        found = ours[pair.mcore].grad[: whole.shape[0]]
        assert float((found - whole).abs().max() / whole.abs().max()) < 1e-5, pair.mcore


LLAMA = ModelShape("llama", 4, 48, 80, 6, 2, 12, 131, 256, init_method_std=0.1)


def packed(boundaries):
    from megatron.core.packed_seq_params import PackedSeqParams

    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)


def test_a_packed_row_is_its_documents_one_by_one():
    model = build_model(LLAMA)
    row, labels = ids(1, 20), ids(1, 20, seed=2)
    together = model(row, labels=labels, packed_seq_params=packed([0, 7, 8, 20]))
    together.backward()
    weight = model.decoder.layers[0].self_attention.linear_qkv.weight
    gradient = weight.grad.clone()
    model.zero_grad()
    pieces = [model(row[:, a:b], labels=labels[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 20))]
    sum(pieces).backward()
    assert float(together) == pytest.approx(float(sum(pieces)), rel=1e-6)
    torch.testing.assert_close(
        gradient, model.decoder.layers[0].self_attention.linear_qkv.weight.grad, rtol=1e-4, atol=1e-5
    )
    assert float(model(row, labels=labels)) != pytest.approx(float(together), rel=1e-3)


def test_no_bit_of_a_document_reaches_another():
    model = build_model(LLAMA)
    row = ids(1, 20)
    changed = row.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 131
    with torch.no_grad():
        before, after = (model(x, packed_seq_params=packed([0, 7, 20])) for x in (row, changed))
        unpacked = model(changed)
    assert torch.equal(before[0, 7:], after[0, 7:]) and not torch.equal(before[0, 3:7], after[0, 3:7])
    assert not torch.equal(unpacked[0, 7:], model(row)[0, 7:])


def test_right_padding_needs_no_mask():
    model = build_model(LLAMA)
    row = ids(2, 10)
    labels = ids(2, 10, seed=2)
    labels[:, 6:] = -100
    other = row.clone()
    other[:, 6:] = 0
    assert torch.equal(model(row, labels=labels), model(other, labels=labels))
    assert float(model(row[:, :6], labels=labels[:, :6])) == pytest.approx(float(model(row, labels=labels)), rel=1e-6)


class Cache:
    def __init__(self):
        self.stored = {}

    def update(self, layer_number, key, value):
        old = self.stored.get(layer_number)
        if old is not None:
            key, value = torch.cat((old[0], key)), torch.cat((old[1], value))
        self.stored[layer_number] = key, value
        return key, value


def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence():
    model = build_model(dataclasses.replace(LLAMA, qk_layernorm=True, window_size=6)).eval()
    row = ids(2, 12)
    cache = Cache()
    with torch.no_grad():
        whole = model(row, gather_logits=True)
        prompt = model(row[:, :8], inference_context=cache, last_position_only=True)
        assert prompt.shape == (2, 1, 131)
        torch.testing.assert_close(prompt, whole[:, 7:8], rtol=1e-5, atol=1e-5)
        for position in range(8, 12):
            at = torch.full((2, 1), position)
            step = model(row[:, position : position + 1], at, inference_context=cache)
            torch.testing.assert_close(step, whole[:, position : position + 1], rtol=1e-5, atol=1e-5)
    assert sorted(cache.stored) == [1, 2, 3, 4]


def test_a_cache_is_refused_where_it_would_be_wrong():
    recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    for options in (BuildOptions(attention_dropout=0.1), BuildOptions(hidden_dropout=0.1), BuildOptions(**recompute)):
        model = build_model(LLAMA, options)
        with pytest.raises(ValueError, match="model.eval"):
            model(ids(1, 4), inference_context=Cache())
        model.eval()(ids(1, 4), inference_context=Cache())
    with pytest.raises(ValueError, match="not packed"):
        model.eval()(ids(1, 4), inference_context=Cache(), packed_seq_params=packed([0, 4]))


@pytest.mark.parametrize(
    "options",
    [
        dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=2),
        dict(recompute_granularity="selective", recompute_modules=("core_attn", "mlp")),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_recomputation_changes_no_gradient_even_with_a_frozen_embedding(options, frozen):
    def gradients(build_options):
        model = build_model(LLAMA, build_options)
        if frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("linear_qkv" in name)
        model(ids(1, 16), labels=ids(1, 16, seed=2), packed_seq_params=packed([0, 7, 16])).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(BuildOptions()), gradients(BuildOptions(**options))
    assert plain.keys() == recomputed.keys() and len(plain) == (4 if frozen else 27)
    for name in plain:
        assert torch.equal(plain[name], recomputed[name]) and recomputed[name].any(), name


def test_the_plain_formulas_can_be_selected_and_give_the_same_gradients():
    from mindspeed_llm.ops import registry

    def gradients(shape, chunk):
        model = build_model(shape, BuildOptions(loss_chunk_size=chunk))
        model(ids(1, 16), labels=ids(1, 16, seed=2), packed_seq_params=packed([0, 7, 16])).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    used = ("attention", "rms_norm", "add_rms_norm", "rotary", "split_qkv_rotary", "swiglu", "linear_cross_entropy_sum")
    for shape in (LLAMA, dataclasses.replace(LLAMA, qk_layernorm=True, window_size=4)):
        fused = gradients(shape, None)
        operators = {name: registry.chosen()[name] for name in used}
        assert registry.REFERENCE not in operators.values()
        try:
            for operator in operators:
                registry.select(operator, registry.REFERENCE)
            plain = gradients(shape, 3)
        finally:
            registry.reset()
        assert not all(torch.equal(plain[name], fused[name]) for name in plain)
        for name in plain:
            assert float((plain[name] - fused[name]).abs().max() / fused[name].abs().max()) < 1e-5, name


def test_initial_weights_depend_on_seed_and_name_alone():
    small, padded = build_model(LLAMA), build_model(LLAMA, BuildOptions(vocab_divisible_by=512))
    other = build_model(LLAMA, BuildOptions(seed=1))
    for name, parameter in small.named_parameters():
        rows = min(131, parameter.shape[0]) if "embedding" in name or "output_layer" in name else parameter.shape[0]
        assert torch.equal(parameter[:rows], dict(padded.named_parameters())[name][:rows])
        assert "layernorm" in name or not torch.equal(parameter, dict(other.named_parameters())[name])
    assert not padded.embedding.word_embeddings.weight[131:].any()
    layers = small.decoder.layers
    assert not torch.equal(layers[0].mlp.linear_fc1.weight, layers[1].mlp.linear_fc1.weight)
    assert float(layers[0].mlp.linear_fc2.weight.std()) == pytest.approx(0.1 / 8**0.5, rel=0.05)
    assert torch.equal(draw(3, "a", (4,), 1.0), draw(3, "a", (4,), 1.0))
    assert not torch.equal(draw(3, "a", (4,), 1.0), draw(3, "b", (4,), 1.0))


def test_inputs_that_would_be_computed_wrongly_are_refused():
    model = build_model(LLAMA)
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 131\)"):
        model(torch.tensor([[131]]))  # a padded row of the embedding
    with pytest.raises(ValueError, match="a mask must be bool"):
        model(ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4))
    windowed = build_model(dataclasses.replace(LLAMA, window_size=3))
    with pytest.raises(ValueError, match="attention_mask goes without sliding window"):
        windowed(ids(1, 4), attention_mask=torch.zeros(1, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="labels must be in"):
        model(ids(1, 4), labels=torch.full((1, 4), 131))


def test_a_mask_of_any_form_takes_the_place_of_causal_order():
    reference = hf_model("llama")
    model = from_hf(reference).eval()
    rows = ids(2, 9)
    hidden = torch.ones(2, 1, 9, 9, dtype=torch.bool).triu(1)
    hidden[0, :, :, :4] = False  # the first row begins with four tokens that see each other
    hidden[1, :, 2:, 1] = True  # nobody sees the second token of the second row
    additive = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    with torch.no_grad():
        found, causal = model(rows, attention_mask=hidden), model(rows)
        expected = reference(rows, attention_mask=additive).logits
    torch.testing.assert_close(found[..., :131], expected, rtol=1e-4, atol=1e-4)
    assert (found - causal)[..., :131].abs().max() > 0.1


def test_dropped_attention_weights_are_refused_under_context_parallelism():
    from mindspeed_llm.errors import UserError

    with pytest.raises(UserError, match="attention_dropout: 0.1 is wrong"):
        model_config(LLAMA, BuildOptions(context_parallel_size=2, attention_dropout=0.1))


def test_generation_is_refused_under_context_parallelism():
    from mindspeed_llm.errors import UserError
    from mindspeed_llm.inference.engine import check_model

    model = build_model(LLAMA)
    check_model(model)
    model.config.context_parallel_size = 2
    with pytest.raises(UserError, match="context parallel > 1 is not possible"):
        check_model(model)
    with pytest.raises(ValueError, match="position_ids must be given under context parallelism"):
        model(ids(1, 4))


def test_the_vocabulary_padding_can_be_dictated_by_a_checkpoint():
    from mindspeed_llm.errors import UserError

    assert build_model(LLAMA, BuildOptions(padded_vocab_size=140)).output_layer.weight.shape[0] == 140
    with pytest.raises(UserError, match="not below 131"):
        build_model(LLAMA, BuildOptions(padded_vocab_size=130))


def test_dropout_acts_in_training_alone():
    model = build_model(LLAMA, BuildOptions(hidden_dropout=0.3, attention_dropout=0.3))
    row = ids(1, 8)
    assert not torch.equal(model(row), model(row))
    model.eval()
    assert torch.equal(model(row), model(row))
    assert torch.equal(model(row), build_model(LLAMA).eval()(row))
