"""From prompts to answers, all in token ids: rows of different length in one batch, each as if it were alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm.errors import UserError
from mindspeed_llm.inference.cache import Cache, cache_dtype
from mindspeed_llm.inference.decode import decode_step
from mindspeed_llm.inference.logits import filter_scores, penalize_repetition
from mindspeed_llm.inference.settings import GenerationSettings
from mindspeed_llm.models.gpt import LanguageModel
from mindspeed_llm.models.rope import LENGTH_DEPENDENT
from mindspeed_llm.models.shape import ModelShape


@dataclass
class Answer:
    """One growing answer.

    Attributes:
        prompt: its tokens.
        tokens: the answer so far, without the token that ended it.
        finish: why it ended: "stop" (a stop token), "string" (a stop string), "length"; None while it grows.
        limit: most tokens it may have.
    """

    prompt: list[int]
    limit: int
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None

    def add(self, token: int, stop_token_ids: Sequence[int]) -> None:
        """Append a chosen token, or end at it."""
        if token in stop_token_ids:
            self.finish = "stop"
            return
        self.tokens.append(token)
        if len(self.tokens) == self.limit:
            self.finish = "length"


def context_length(shape: ModelShape) -> int:
    """The most tokens that the model's positions are defined for, stretching included."""
    scaling = shape.rope_scaling or {}
    trained = scaling.get("original_max_position_embeddings") or shape.max_position_embeddings
    return max(shape.max_position_embeddings, int(trained * (scaling.get("factor") or 1)))


def new_answers(shape: ModelShape, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> list[Answer]:
    """Empty answers to the prompts.

    Raises:
        UserError: a prompt is empty, or leaves no room for an answer.
    """
    longest = min(settings.max_length or context_length(shape), context_length(shape))
    answers = []
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number + 1}: it has no tokens; legal: at least one")
        room = longest - len(prompt)
        if room < 1:
            raise UserError(
                f"prompt {number + 1}: {len(prompt)} tokens are too many, because prompt and answer have room for "
                f"{longest}; legal: up to {longest - 1}"
            )
        answers.append(Answer(list(prompt), min(settings.max_new_tokens, room)))
    return answers


def decode_steps(
    model: LanguageModel, answers: list[Answer], settings: GenerationSettings, first: int = 0
) -> Iterator[list[int]]:
    """Grow the answers token by token (greedy or drawn).

    Args:
        first: number of the first prompt among all; with the seed it decides what is drawn.

    Yields:
        After each step the numbers of the answers that took part; they have a new token or have ended. The consumer
        may set an answer's `finish` to end it.
    """
    check_model(model)
    numbered = list(enumerate(answers, first))
    if _rows_apart(model):
        for row in numbered:
            yield from _decode(model, [row], settings)
    else:
        yield from _decode(model, numbered, settings)


def check_model(model: LanguageModel) -> None:
    """Raise UserError for a model that is only a part, or whose activations are cut along the sequence."""
    if not (model.pre_process and model.post_process):
        raise UserError("generation: pipeline parallel > 1 is not possible; legal: 1 with any tensor parallel size")
    if model.config.context_parallel_size > 1:
        raise UserError("generation: context parallel > 1 is not possible; legal: 1 with any tensor parallel size")
    if model.config.sequence_parallel:
        raise UserError("generation: sequence parallelism is not possible; legal: build the model without it")


def _rows_apart(model: LanguageModel) -> bool:
    """Whether rows cannot share a batch: their frequencies depend on their own length."""
    return (model.config.shape.rope_scaling or {}).get("rope_type") in LENGTH_DEPENDENT


@torch.inference_mode()
def next_logits(runner: CachedRunner | UncachedRunner, tokens: list[int] | None) -> Tensor:
    """fp32 logits [b, v] after the prompts (`tokens` None) or after one more token in each row."""
    return (runner.prefill() if tokens is None else runner.step(tokens)).float()


def _decode(
    model: LanguageModel, active: list[tuple[int, Answer]], settings: GenerationSettings
) -> Iterator[list[int]]:
    """`decode_steps` of numbered answers that share a batch."""
    runner = new_runner(model, [answer for _, answer in active], settings.use_kv_cache)
    streams = {number: random_stream(settings.seed, number) for number, _ in active}
    tokens = None
    while True:
        logits = next_logits(runner, tokens)
        chosen = choose(logits, [a for _, a in active], settings, [streams[number] for number, _ in active])
        for (_, answer), token in zip(active, agree(chosen, model)):
            answer.add(token, settings.stop_token_ids)
        yield [number for number, _ in active]
        left = [row for row, (_, answer) in enumerate(active) if answer.finish is None]
        if not left:
            return
        if len(left) < len(active):
            runner.select(left)
            active = [active[row] for row in left]
        tokens = [answer.tokens[-1] for _, answer in active]


def choose(
    logits: Tensor, answers: Sequence[Answer], settings: GenerationSettings, streams: Sequence[torch.Generator]
) -> Tensor:
    """The next token of each row, [b], from logits [b, v]."""
    scores = penalize_repetition(logits, [a.prompt + a.tokens for a in answers], settings.repetition_penalty)
    if not settings.do_sample:
        return scores.argmax(-1)
    probabilities = filter_scores(scores, settings).softmax(-1).cpu()
    drawn = [torch.multinomial(p, 1, generator=stream) for p, stream in zip(probabilities, streams)]
    return torch.cat(drawn).to(logits.device)


def random_stream(seed: int, number: int) -> torch.Generator:
    """The stream that draws the answer to prompt `number`, on the CPU whatever the device."""
    # Seeds of neighbouring prompts are far apart; 2^63 is the bound of torch's seeds.
    return torch.Generator().manual_seed((seed + number * 0x9E3779B97F4A7C15) % 2**63)


def agree(chosen: Tensor, model: LanguageModel) -> list:
    """The values of the first tensor-parallel rank, on all of them: ranks that differed would wait for ever."""
    if model.tp_group.size() > 1:
        chosen = chosen.clone()
        dist.broadcast(chosen, dist.get_global_rank(model.tp_group, 0), group=model.tp_group)
    return chosen.tolist()


def new_runner(model: LanguageModel, answers: list[Answer], use_kv_cache: bool) -> CachedRunner | UncachedRunner:
    """What computes logits for these answers."""
    return (CachedRunner if use_kv_cache else UncachedRunner)(model, answers)


class CachedRunner:
    """Logits through a cache: the prompts once, then one token a step."""

    def __init__(self, model: LanguageModel, answers: list[Answer]):
        self.model, self.prompts = model, [a.prompt for a in answers]
        shape, weight = model.config.shape, model.output_weight()
        longest = max(len(a.prompt) + a.limit for a in answers)
        self.cache = Cache(
            [layer.self_attention.layer_number for layer in model.decoder.layers],
            len(answers),
            shape.num_query_groups // model.tp_group.size(),
            longest,
            shape.kv_channels,
            cache_dtype(model.config.params_dtype, weight.device),
            weight.device,
            shape.value_channels,
        )
        self.device = weight.device
        self.decode = decode_step(model, self.cache, longest)

    def prefill(self) -> Tensor:
        """Logits [b, v] after the prompts."""
        logits: dict[int, Tensor] = {}
        for length in sorted({len(p) for p in self.prompts}):
            rows = [i for i, p in enumerate(self.prompts) if len(p) == length]
            context = self.cache.rows(rows)
            ids = torch.tensor([self.prompts[i] for i in rows], device=self.device)
            out = self.model(ids, inference_context=context, last_position_only=True)
            context.advance(length)
            logits.update(zip(rows, out[:, -1]))
        return torch.stack([logits[i] for i in range(len(self.prompts))])

    def step(self, tokens: list[int]) -> Tensor:
        """Logits [b, v] after one more token in each row."""
        return self.decode.step(torch.tensor(tokens, device=self.device))

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows (some may be taken several times)."""
        self.cache.select(rows)


class UncachedRunner:
    """Logits by computing everything again."""

    def __init__(self, model: LanguageModel, answers: list[Answer]):
        self.model, self.sequences = model, [list(a.prompt) for a in answers]
        self.device = model.output_weight().device

    def prefill(self) -> Tensor:
        """Logits [b, v] after all tokens so far."""
        rows = []
        for sequence in self.sequences:
            ids = torch.tensor([sequence], device=self.device)
            rows.append(self.model(ids, last_position_only=True, gather_logits=True)[0, -1])
        return torch.stack(rows)

    def step(self, tokens: list[int]) -> Tensor:
        """Logits [b, v] after one more token in each row."""
        for sequence, token in zip(self.sequences, tokens):
            sequence.append(token)
        return self.prefill()

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows (some may be taken several times)."""
        self.sequences = [list(self.sequences[i]) for i in rows]
