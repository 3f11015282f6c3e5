#!/usr/bin/env python3
"""Generation at batch 1: tokens/s here, in transformers, and as a share of the machine's memory-read bandwidth.

    python benchmarks/generate.py [--tokens 64] [--rounds 5] [--threads 2] [--dtype bf16|fp32] [--model HF_DIR]

Without --model: a random Llama of 134M parameters. Every token reads all weights but the embedding once, so reading
memory is the limit. The sides take turns; medians of the rounds. Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings

AIM_SHARE_OF_BANDWIDTH = 0.5
LLAMA_134M = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}
PROMPT = "The statement is executed by first evaluating the expression and then"


def read_bandwidth() -> float:
    """GB/s of the fastest of several ways to read 256 MiB once."""
    import torch

    size = 2**28
    sums = [torch.ones(size // 8, dtype=torch.int64), torch.ones(size // 8, dtype=torch.float64), torch.ones(size // 4)]
    return max(size / 1e9 / seconds(x.sum) for x in sums)


def seconds(action) -> float:
    """Best of 4."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def tokens_per_second(generate, tokens: int) -> float:
    """Of the tokens after the first, so that reading the prompt is left out.

    Args:
        generate: called with the number of tokens to make; makes exactly so many.
    """
    start = time.perf_counter()
    generate(1)
    first = time.perf_counter() - start
    start = time.perf_counter()
    generate(tokens)
    return (tokens - 1) / (time.perf_counter() - start - first)


def our_side(directory: str, dtype: str):
    """A function that makes n tokens, and the bytes of weights read for one."""
    import mindspeed_llm
    from mindspeed_llm.inference.engine import decode_steps, new_answers
    from mindspeed_llm.inference.settings import GenerationSettings

    loaded = mindspeed_llm.load_model(directory, dtype=dtype)
    model, ids = loaded.model, loaded.encode(PROMPT)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding = model.embedding.word_embeddings.weight
    tied = model.output_weight() is embedding
    made = []

    def generate(count: int) -> None:
        settings = GenerationSettings(max_new_tokens=count)
        [answer] = answers = new_answers(model.config.shape, [ids], settings)
        for _ in decode_steps(model, answers, settings):
            pass
        made[:] = answer.tokens

    return generate, made, parameters - (0 if tied else embedding.numel() * embedding.element_size())


def their_side(directory: str, dtype: str):
    """The same with transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=types[dtype], attn_implementation="sdpa").eval()
    inputs = AutoTokenizer.from_pretrained(directory)(PROMPT, return_tensors="pt")
    made = []

    def generate(count: int) -> None:
        out = model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        made[:] = out[0, inputs["input_ids"].shape[1] :].tolist()

    return generate, made


def measure(directory: str, args) -> dict:
    """Interleaved rounds of both sides and the bandwidth."""
    ours, our_tokens, bytes_per_token = our_side(directory, args.dtype)
    theirs, their_tokens = their_side(directory, args.dtype)
    sides = {"ours": ours, "transformers": theirs}
    for generate in sides.values():
        generate(4)
    rates = {"ours": [], "transformers": [], "bandwidth": []}
    for _ in range(args.rounds):
        for name, generate in sides.items():
            rates[name].append(tokens_per_second(generate, args.tokens))
        rates["bandwidth"].append(read_bandwidth())
    medians = {name: statistics.median(values) for name, values in rates.items()}
    read = medians["ours"] * bytes_per_token / 1e9
    shared = next((n for n, (a, b) in enumerate(zip(our_tokens, their_tokens)) if a != b), args.tokens)
    return {
        "benchmark": "generate",
        "batch": 1,
        "dtype": args.dtype,
        "threads": args.threads,
        "tokens_per_second": round(medians["ours"], 2),
        "transformers_tokens_per_second": round(medians["transformers"], 2),
        "speedup": round(statistics.median(a / b for a, b in zip(rates["ours"], rates["transformers"])), 2),
        "megabytes_read_per_token": round(bytes_per_token / 1e6, 1),
        "gigabytes_read_per_second": round(read, 2),
        "read_bandwidth_gigabytes_per_second": round(medians["bandwidth"], 2),
        "share_of_read_bandwidth": round(
            statistics.median(a * bytes_per_token / 1e9 / b for a, b in zip(rates["ours"], rates["bandwidth"])), 3
        ),
        "aim_share_of_read_bandwidth": AIM_SHARE_OF_BANDWIDTH,
        "equal_leading_tokens": shared,
        "tokens": args.tokens,
        "load_average": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--model", help="HF directory")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(args.threads)
    from mindspeed_llm.checkpoint.toy import make_toy

    standard_output, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.model or str(make_toy("llama", scratch, dtype="bfloat16", **LLAMA_134M))
        result = measure(directory, args)
    print(json.dumps(result), file=standard_output)


if __name__ == "__main__":
    main()
