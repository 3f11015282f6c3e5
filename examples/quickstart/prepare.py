"""First stage of quickstart.sh: a corpus, instructions, a tokenizer and the config.json of a small Llama.

The text is the documentation of Python's own standard library. Whole modules are held out, so that nothing asked of
the tuned model at the end stands in what it was trained on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from recipes import note_stage, run_recipe

from mindspeed_llm.data.corpus import train_tokenizer, write_stdlib_corpus, write_stdlib_instructions

# What the tuned model must answer word for word; every Python has these functions.
TAUGHT = (
    "textwrap.dedent",
    "heapq.heappush",
    "statistics.median",
    "shutil.copytree",
    "json.dumps",
    "random.Random.shuffle",
    "glob.glob",
    "difflib.get_close_matches",
)
NUM_TAUGHT = 5
COPIES = 80  # of each taught row among the training rows
NUM_OTHERS = 1200  # training rows beside them
NUM_UNSEEN = 3
SEED = 1234
VOCAB_SIZE = 4096


def llama_config(hidden_size: int, num_layers: int) -> dict:
    """config.json of a Llama with these dimensions, otherwise shaped as Llama-2 with grouped queries."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 11 // 4,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": hidden_size // 64,
        "max_position_embeddings": 1024,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.06,  # 1 / sqrt(256): at this width 0.02 learns more slowly
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def write_instructions(directory: Path, shuffle_answers: bool) -> dict[str, int]:
    """Write instructions.json (training), heldout.json and questions.json; returns how many rows each has.

    Args:
        shuffle_answers: give every training question the answer of another one: the control that must fail.
    """
    train_file, heldout_file = write_stdlib_instructions(directory)
    train, heldout = (json.loads(file.read_text(encoding="utf-8")) for file in (train_file, heldout_file))
    by_name = {row["instruction"]: row for row in train}
    taught = [by_name[q] for q in (f"What does {name} do?" for name in TAUGHT) if q in by_name][:NUM_TAUGHT]
    draw = random.Random(SEED)
    others = [row for row in train if row not in taught]
    rows = draw.sample(others, min(NUM_OTHERS, len(others))) + taught * COPIES
    if shuffle_answers:
        rows = _with_other_answers(rows, random.Random(SEED))
    draw.shuffle(rows)
    unseen = draw.sample([row for row in heldout if 20 < len(row["output"]) < 100], NUM_UNSEEN)
    questions = [{**row, "taught": True} for row in taught] + [{**row, "taught": False} for row in unseen]
    for name, content in (("instructions", rows), ("heldout", heldout), ("questions", questions)):
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return {"instructions": len(rows), "heldout": len(heldout), "questions": len(questions)}


def _with_other_answers(rows: list[dict], draw: random.Random) -> list[dict]:
    """The same questions, each with the answer of another one (the same one wherever the question is repeated)."""
    answers = {row["instruction"]: row["output"] for row in rows}
    questions = sorted(answers)
    other = dict(zip(questions, draw.sample(questions, len(questions))))
    return [{**row, "output": answers[other[row["instruction"]]]} for row in rows]


def main() -> None:
    """Write everything below the given directory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--shuffle-answers", action="store_true", help="the control: answers that do not belong")
    args = parser.parse_args()
    start = time.monotonic()
    data, model = args.directory / "data", args.directory / "tokenizer_and_config"
    corpus, _ = write_stdlib_corpus(data)
    counts = write_instructions(data, args.shuffle_answers)
    train_tokenizer(model, VOCAB_SIZE)
    (model / "config.json").write_text(json.dumps(llama_config(args.hidden_size, args.num_layers), indent=2) + "\n")
    print(f"corpus:       {corpus} ({corpus.stat().st_size / 1e6:.1f} MB compressed)")
    print(f"instructions: {counts['instructions']} rows to train on, {counts['heldout']} of other modules held out")
    print(f"tokenizer:    {VOCAB_SIZE} tokens, trained on the corpus, in {model}")
    note_stage("corpus, instructions, tokenizer", time.monotonic() - start)
    for recipe, source, prefix in (
        ("data_convert_llama2_pretrain", corpus, "corpus"),
        ("data_convert_llama2_instruction", data / "instructions.json", "instructions"),
        ("data_convert_llama2_instruction", data / "heldout.json", "heldout"),
    ):
        run_recipe(recipe, {"INPUT": str(source), "OUTPUT_PREFIX": str(data / prefix)})


if __name__ == "__main__":
    main()
