"""Greedy decoding, repetition penalty and beam search give transformers' tokens; filters give its scores."""

import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mindspeed_llm.inference.beam import beam_search
from mindspeed_llm.inference.decode import DecodeStep
from mindspeed_llm.inference.engine import decode_steps, new_answers
from mindspeed_llm.inference.logits import filter_scores, penalize_repetition
from mindspeed_llm.inference.settings import GenerationSettings

PROMPTS = [
    "The quick brown fox",
    "def f(x):\n    return",
    "a",
    "Statements and expressions are evaluated in the order of their appearance in the text of",
]
NEW = 24


def ours(loaded, prompts, **settings):
    """Tokens of the answers, without stop tokens."""
    chosen = GenerationSettings(max_new_tokens=NEW, **settings)
    answers = new_answers(loaded.model.config.shape, [loaded.encode(p) for p in prompts], chosen)
    if chosen.num_beams > 1:
        for number, answer in enumerate(answers):
            beam_search(loaded.model, answer, chosen, lambda tokens: False, number)
    else:
        for _ in decode_steps(loaded.model, answers, chosen):
            pass
    return [answer.tokens for answer in answers]


def theirs(model, loaded, prompts, stops, **options):
    """The same by transformers.generate, a prompt at a time."""
    options |= dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=list(stops) or None)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([loaded.encode(prompt)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
        ended = next((n for n, token in enumerate(out) if token in stops), len(out))
        answers.append(out[:ended])
    return answers


def frequent_tokens(answers, count):
    """Tokens from the middle of greedy answers: as stop tokens they make answers end at different places."""
    return tuple(dict.fromkeys(answer[(5 * n + 4) % len(answer)] for n, answer in enumerate(answers)))[:count]


@pytest.mark.parametrize("family, penalty", [("llama", 1.0), ("llama", 1.3), ("qwen3", 1.0), ("deepseek_v3", 1.3)])
def test_greedy_tokens_are_those_of_transformers(load, reference, family, penalty):
    loaded = load(family)
    expected = theirs(reference(family), loaded, PROMPTS, (), repetition_penalty=penalty)
    assert ours(loaded, PROMPTS, repetition_penalty=penalty) == expected
    stops = frequent_tokens(expected, 3)
    shorter = theirs(reference(family), loaded, PROMPTS, stops, repetition_penalty=penalty)
    assert any(len(a) < NEW for a in shorter)
    assert ours(loaded, PROMPTS, repetition_penalty=penalty, stop_token_ids=stops) == shorter


@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=2),
        pytest.param(dict(num_beams=4), marks=pytest.mark.slow),
        dict(num_beams=3, length_penalty=2.0),
        pytest.param(dict(num_beams=3, length_penalty=-1.0), marks=pytest.mark.slow),
        pytest.param(dict(num_beams=3, length_penalty=0.0), marks=pytest.mark.slow),
        dict(num_beams=3, repetition_penalty=1.2),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_beam_search_is_that_of_transformers(load, reference, family, options):
    loaded, model = load(family), reference(family)
    assert ours(loaded, PROMPTS[:2], **options) == theirs(model, loaded, PROMPTS[:2], (), **options)
    stops = frequent_tokens(ours(loaded, PROMPTS, **options), 3)
    expected = theirs(model, loaded, PROMPTS, stops, **options)
    # A large length penalty prefers answers that never end.
    assert any(len(a) < NEW for a in expected) or options.get("length_penalty") == 2.0
    assert ours(loaded, PROMPTS, stop_token_ids=stops, **options) == expected
    assert ours(loaded, PROMPTS[:1], stop_token_ids=stops, use_kv_cache=False, **options) == expected[:1]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_comparison_notices_a_wrong_position(load, reference, family, monkeypatch):
    loaded = load(family)
    table = DecodeStep._table
    # From the sixth position on, every token believes it stands one place further.
    monkeypatch.setattr(DecodeStep, "_table", lambda self, p, n: table(self, p + (p > 5).long(), n))
    assert ours(loaded, PROMPTS) != theirs(reference(family), loaded, PROMPTS, ())


def test_filters_are_those_of_transformers():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 500, generator=generator) * 4
    scores[0, :100] = scores[0, 0]  # equal scores
    for temperature, k, p, keep in [(0.7, 50, 0.95, 1), (1.0, 0, 0.3, 1), (2.0, 7, 1.0, 1), (0.5, 1, 0.01, 4)]:
        expected = TemperatureLogitsWarper(temperature)(None, scores)
        if k:
            expected = TopKLogitsWarper(k, min_tokens_to_keep=keep)(None, expected)
        if p < 1:
            expected = TopPLogitsWarper(p, min_tokens_to_keep=keep)(None, expected)
        got = filter_scores(scores, GenerationSettings(temperature=temperature, top_k=k, top_p=p), keep)
        assert torch.equal(got, expected)


def test_repetition_penalty_is_that_of_transformers():
    scores = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    seen = torch.tensor([[1, 2, 3, 3], [4, 4, 4, 4]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, scores.clone())
    before = scores.clone()
    assert torch.equal(penalize_repetition(scores, seen.tolist(), 1.7), expected)
    assert torch.equal(scores, before)
    assert not torch.equal(penalize_repetition(scores, [[5], [6]], 1.7), expected)
