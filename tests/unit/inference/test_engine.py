"""Cache, batches, sampling and limits."""

import dataclasses

import pytest
import torch

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError
from mindspeed_llm.inference.cache import Cache
from mindspeed_llm.inference.decode import DecodeStep
from mindspeed_llm.inference.engine import context_length, decode_steps, new_answers
from mindspeed_llm.inference.settings import GenerationSettings

PROMPTS = ["The quick brown fox", "a", "def f(x):\n    return x +", "import", "for name in sorted(topics): print("]


def generate(loaded, prompts, first=0, **settings):
    settings = GenerationSettings(**{"max_new_tokens": 20, **settings})
    answers = new_answers(loaded.model.config.shape, [loaded.encode(p) for p in prompts], settings)
    for _ in decode_steps(loaded.model, answers, settings, first):
        pass
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_computes_what_the_model_computes(load, family, dtype):
    loaded = load(family, dtype=dtype)
    model, shape = loaded.model, loaded.model.config.shape
    ids = torch.randint(0, shape.vocab_size, (3, 12), generator=torch.Generator().manual_seed(2))
    layers = range(1, shape.num_layers + 1)
    cache = Cache(layers, 3, shape.num_query_groups, 12, shape.kv_channels, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        expected = model(ids, gather_logits=True).float()
        step = DecodeStep(model, cache, 12)
        got = torch.stack([step.step(ids[:, n]) for n in range(12)], dim=1).float()
    difference = (got - expected).abs().max() / expected.abs().max()
    assert difference < (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_module_path_through_the_cache_agrees_too(load, family):
    model = load(family).model
    shape = model.config.shape
    ids = torch.randint(0, shape.vocab_size, (2, 9), generator=torch.Generator().manual_seed(3))
    layers = range(1, shape.num_layers + 1)
    cache = Cache(layers, 2, shape.num_query_groups, 9, shape.kv_channels, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        expected, got = model(ids, gather_logits=True), []
        for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
            rows = cache.rows([0, 1])
            positions = torch.arange(part.start, part.stop)[None]
            got.append(model(ids[:, part], positions, inference_context=rows))
            rows.advance(part.stop - part.start)
    assert torch.allclose(torch.cat(got, 1), expected, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, dict(do_sample=True), dict(repetition_penalty=1.4)], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_batch_answers_as_one_by_one_and_as_without_cache(load, family, settings):
    loaded = load(family)
    stops = tuple(generate(loaded, PROMPTS, **settings)[n][5 + 3 * n] for n in range(3))
    together = generate(loaded, PROMPTS, stop_token_ids=stops, **settings)
    assert len({len(tokens) for tokens in together}) > 1
    alone = [generate(loaded, [p], n, stop_token_ids=stops, **settings)[0] for n, p in enumerate(PROMPTS)]
    assert together == alone
    assert together == generate(loaded, PROMPTS, stop_token_ids=stops, use_kv_cache=False, **settings)


def test_a_row_that_sees_its_neighbours_padding_is_noticed(load, monkeypatch):
    from mindspeed_llm.inference import decode

    loaded = load("llama")
    expected = generate(loaded, PROMPTS)
    monkeypatch.setattr(
        decode.Positions, "mask", lambda self, w: torch.ones(len(self.rows), 1, 1, self.longest + 1) > 0
    )
    assert generate(loaded, PROMPTS) != expected


def test_the_seed_decides_what_is_drawn(load):
    loaded = load("llama")
    draw = [generate(loaded, PROMPTS[:2], do_sample=True, seed=seed) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    torch.manual_seed(5)
    assert generate(loaded, PROMPTS[:2], do_sample=True, seed=1) == draw[0]
    same = generate(loaded, [PROMPTS[0]] * 2, do_sample=True, seed=1)
    assert same[0] != same[1], "two prompts of a batch draw from streams of their own"


def test_drawn_tokens_follow_the_filtered_distribution(load):
    loaded = load("llama")
    prompt = loaded.encode("The quick brown fox")
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([prompt]), gather_logits=True)[0, -1]
    likeliest = logits.topk(3)
    probabilities = (likeliest.values / 2.0).softmax(-1)
    settings = GenerationSettings(max_new_tokens=1, do_sample=True, top_k=3, temperature=2.0)
    answers = new_answers(loaded.model.config.shape, [prompt] * 1500, settings)
    for _ in decode_steps(loaded.model, answers, settings):
        pass
    drawn = torch.tensor([answer.tokens[0] for answer in answers])
    share = torch.stack([(drawn == token).float().mean() for token in likeliest.indices])
    assert share.sum() == 1
    assert (share - probabilities).abs().max() < 0.05


def test_sliding_windows_are_kept(tmp_path):
    import mindspeed_llm

    loaded = mindspeed_llm.load_model(make_toy("mistral", tmp_path, sliding_window=6))
    assert loaded.model.config.shape.window_size == 6
    cached = generate(loaded, PROMPTS)
    assert cached == generate(loaded, PROMPTS, use_kv_cache=False)
    assert cached == [generate(loaded, [p])[0] for p in PROMPTS]


def test_stretching_that_depends_on_the_length_follows_each_row(tmp_path):
    import mindspeed_llm

    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    path = make_toy("llama", tmp_path, rope_parameters=scaling, max_position_embeddings=12)
    loaded = mindspeed_llm.load_model(path)
    assert context_length(loaded.model.config.shape) == 48
    assert generate(loaded, PROMPTS) == [generate(loaded, [p])[0] for p in PROMPTS]


def test_answers_end_at_the_context_and_prompts_must_fit(load):
    loaded = load("llama")
    long = "word " * 60
    count = len(loaded.encode(long))
    assert len(generate(loaded, [long], max_length=count + 3)[0]) == 3
    assert len(generate(loaded, [long], max_new_tokens=500)[0]) == 256 - count
    with pytest.raises(UserError, match=f"{count} tokens are too many"):
        generate(loaded, [long], max_length=count)
    with pytest.raises(UserError, match="no tokens"):
        generate(loaded, [""])


def test_padded_vocabulary_is_never_chosen(load):
    loaded = load("llama")
    shape = loaded.model.config.shape
    from mindspeed_llm.models.build import BuildOptions, build_model

    padded = build_model(shape, BuildOptions(vocab_divisible_by=128))
    rows = padded.output_layer.weight.shape[0]
    assert rows == 1024 > shape.vocab_size
    with torch.no_grad():
        # The padded rows would win everywhere if anybody looked at them.
        padded.output_layer.weight[shape.vocab_size :] = padded.output_layer.weight[:27] * 50
    padded.eval()
    other = dataclasses.replace(loaded, model=padded)
    for settings in ({}, dict(do_sample=True, temperature=50.0, top_k=0), dict(use_kv_cache=False)):
        tokens = [t for answer in generate(other, PROMPTS, **settings) for t in answer]
        assert max(tokens) < shape.vocab_size


@pytest.mark.parametrize(
    "wrong", [dict(temperature=0), dict(top_p=1.2), dict(max_new_tokens=0), dict(num_beams=0), dict(stop_strings=("",))]
)
def test_settings_without_meaning_are_refused(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}.*legal"):
        GenerationSettings(**wrong)
