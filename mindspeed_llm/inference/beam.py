"""Beam search for one prompt: the same answers as transformers' with `early_stopping=False`.

A beam is a row of the runner. Each step scores every continuation of every beam and keeps the best; those that end
compete, by their score divided by length^length_penalty, for the answers kept. It stops when the best running beam,
scored at the current length, is no better than the worst answer kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_llm.inference.engine import Answer, agree, new_runner, next_logits, random_stream
from mindspeed_llm.inference.logits import filter_scores, penalize_repetition
from mindspeed_llm.inference.settings import GenerationSettings
from mindspeed_llm.models.gpt import LanguageModel


@dataclass(frozen=True)
class Beam:
    """An unfinished answer.

    Attributes:
        score: sum of its log-probabilities.
    """

    tokens: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class Candidate:
    """A continuation: `token` after the beam in row `row`, with the beam's score and its own log-probability."""

    row: int
    token: int
    score: float


@dataclass(frozen=True)
class Finished:
    """An ended answer and its score divided by length^length_penalty."""

    tokens: tuple[int, ...]
    score: float
    finish: str


def beam_search(
    model: LanguageModel,
    answer: Answer,
    settings: GenerationSettings,
    stops_at: Callable[[Sequence[int]], bool],
    number: int = 0,
) -> None:
    """Fill `answer` with the best of the search; with `do_sample` continuations are drawn without replacement.

    Args:
        stops_at: whether an answer of these tokens contains a stop string.
        number: place of the prompt among all, for its random stream.
    """
    stream = random_stream(settings.seed, number)
    beams, kept = [Beam((), 0.0)], []
    runner = new_runner(model, [answer], settings.use_kv_cache)
    logits = next_logits(runner, None)
    for length in range(1, answer.limit + 1):
        candidates = continuations(logits, beams, answer, settings, stream, model)
        ended = [_finish(beams, c, answer, settings, stops_at) for c in candidates]
        for candidate, finish in list(zip(candidates, ended))[: settings.num_beams]:
            if finish is not None:
                tokens = (*beams[candidate.row].tokens, candidate.token)
                kept.append(Finished(tokens, candidate.score / length**settings.length_penalty, finish))
        # sorted is stable: of equal scores the older answer stays, as in transformers.
        kept = sorted(kept, key=lambda f: -f.score)[: settings.num_beams]
        running = sorted((c for c, f in zip(candidates, ended) if f is None), key=lambda c: -c.score)
        running = running[: settings.num_beams]
        if not running or _is_hopeless(running[0].score, kept, length, settings):
            break
        runner.select([c.row for c in running])
        beams = [Beam((*beams[c.row].tokens, c.token), c.score) for c in running]
        logits = next_logits(runner, [c.token for c in running])
    best = kept[0]
    answer.tokens = list(best.tokens[:-1] if best.finish == "stop" else best.tokens)
    answer.finish = best.finish


def continuations(
    logits: Tensor,
    beams: list[Beam],
    answer: Answer,
    settings: GenerationSettings,
    stream: torch.Generator,
    model: LanguageModel,
) -> list[Candidate]:
    """The best (or drawn) continuations of all beams, enough for num_beams to go on whatever ends.

    Args:
        logits: fp32 [beams, v].
    """
    scores = penalize_repetition(
        logits.log_softmax(-1), [[*answer.prompt, *b.tokens] for b in beams], settings.repetition_penalty
    )
    ends = len(set(settings.stop_token_ids))
    if settings.do_sample:
        scores = filter_scores(scores, settings, keep=ends + 1)
    total = (scores + torch.tensor([[b.score] for b in beams], device=scores.device)).flatten()
    count = min(max(2, 1 + ends) * settings.num_beams, total.numel())
    if settings.do_sample:
        # Adding Gumbel noise and taking the highest draws without replacement (arXiv 1903.06059).
        noise = torch.empty(total.shape).exponential_(generator=stream).log_().neg_().to(total.device)
        order = (total + noise).topk(count).indices
    else:
        order = total.topk(count).indices
    picked, chosen = agree(order, model), agree(total[order], model)
    return [
        Candidate(i // scores.shape[-1], i % scores.shape[-1], score)
        for i, score in zip(picked, chosen)
        if score > float("-inf")
    ]


def _finish(
    beams: list[Beam],
    candidate: Candidate,
    answer: Answer,
    settings: GenerationSettings,
    stops_at: Callable[[Sequence[int]], bool],
) -> str | None:
    tokens = (*beams[candidate.row].tokens, candidate.token)
    if candidate.token in settings.stop_token_ids:
        return "stop"
    if stops_at(tokens):
        return "string"
    return "length" if len(tokens) == answer.limit else None


def _is_hopeless(best_running: float, kept: list[Finished], length: int, settings: GenerationSettings) -> bool:
    """Whether no running beam can displace an answer kept, judged at the length reached."""
    if len(kept) < settings.num_beams:
        return False
    return best_running / length**settings.length_penalty <= kept[-1].score
