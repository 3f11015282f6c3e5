"""What decides how an answer is made."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_llm.errors import UserError


@dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen and when an answer ends; names and meanings as in transformers' GenerationConfig.

    Args:
        max_new_tokens: longest answer.
        max_length: longest prompt plus answer, None for the model's context.
        do_sample: draw tokens; otherwise take the likeliest one, or search with beams.
        temperature: divides the scores before drawing.
        top_k: draw from the k likeliest tokens; 0 for all.
        top_p: draw from the likeliest tokens that together hold this probability.
        repetition_penalty: scores of tokens in the prompt or the answer are divided (negative ones multiplied) by it.
        num_beams: beams of beam search; 1 searches none.
        length_penalty: a finished beam's score is divided by its length to this power.
        stop_token_ids: tokens that end an answer.
        stop_strings: texts that end an answer; they are cut off.
        use_kv_cache: keep keys and values of earlier tokens; otherwise everything is computed again for each token.
        seed: of the drawing; the answer to the i-th prompt depends on (seed, i) and not on the other prompts.
    """

    max_new_tokens: int = 128
    max_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    use_kv_cache: bool = True
    seed: int = 1234

    def __post_init__(self):
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "max_length": (self.max_length is None or self.max_length >= 2, "2 or more, or None"),
            "temperature": (self.temperature > 0, "more than 0; try: do_sample=False for the likeliest tokens"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 <= self.top_p <= 1, "0 to 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "more than 0"),
            "num_beams": (self.num_beams >= 1, "1 or more"),
            "stop_strings": (all(self.stop_strings), "texts of at least one character"),
        }
        for name, (holds, legal) in ranges.items():
            if not holds:
                raise UserError(f"{name}: {getattr(self, name)} is wrong, because it has no meaning; legal: {legal}")
