"""Options of `inference.py`."""

from __future__ import annotations

from mindspeed_llm.config.schema import above, at_least, between, option, section


@section
class InferenceConfig:
    """Prompts, decoding and where answers go."""

    task: list[str] | None = option(
        help="what to do; default: a demonstration of all, then chat",
        choices=("greedy", "do_sample", "beam_search", "beam_search_with_sampling", "chat"),
    )
    prompt: list[str] | None = option(help="prompts to answer")
    prompt_file: str | None = option(help="prompts from a txt (one a line), json or jsonl file")
    output_file: str | None = option(help="write prompts and answers as jsonl instead of printing them", writes="file")
    max_new_tokens: int = option(128, help="longest answer in tokens", check=at_least(1))
    max_length: int | None = option(help="longest prompt plus answer in tokens", level="advanced", check=at_least(2))
    temperature: float = option(0.7, help="of sampling", check=above(0))
    top_k: int = option(50, help="sample from the k likeliest tokens; 0 for all", check=at_least(0))
    top_p: float = option(0.95, help="sample from the likeliest tokens that hold this probability", check=between(0, 1))
    repetition_penalty: float = option(1.0, help="divides the scores of tokens seen before", check=above(0))
    num_beams: int = option(2, help="beams of beam search", check=at_least(1))
    length_penalty: float = option(1.0, help="exponent of the length in beam scores", level="advanced")
    stop: list[str] | None = option(help="strings that end an answer")
    add_eos_token: list[str] | None = option(help="further tokens that end an answer", level="advanced")
    system: str | None = option(help="system message of the chat template")
    hf_chat_template: bool = option(
        help="use the tokenizer's own chat template (as --prompt-type hf)", level="advanced"
    )
    history_turns: int = option(3, help="question/answer pairs the chat remembers", check=at_least(0))
    use_kv_cache: bool = option(True, help="keep keys and values of earlier tokens", level="advanced")
    stream: bool = option(True, help="print the answer while it is made", level="advanced")
