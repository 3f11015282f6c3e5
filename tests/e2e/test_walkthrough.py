"""The llama2 walk-through with the names people have in their notes, on a toy Llama, through the recipes."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from mindspeed_llm.checkpoint.toy import edit_config, make_toy
from mindspeed_llm.data.corpus import train_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DOORS = {
    "preprocess_data.py": "preprocess",
    "convert_ckpt.py": "convert",
    "pretrain_gpt.py": "pretrain",
    "posttrain_gpt.py": "posttrain",
    "inference.py": "inference",
}
HF = "model_from_hf/llama-2-7b-hf"
PARQUET = "dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet"
SMALL = {"SEQ_LENGTH": "128", "MBS": "2", "GBS": "4", "TRAIN_ITERS": "2", "LR": "1e-3", "DTYPE_FLAG": ""}
ONE = {"NPROC_PER_NODE": "1", "TP": "1", "PP": "1"}


class Clone:
    """A working copy in which the recipes' relative paths lead to toy-sized things."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for directory in ("examples", "configs"):
            shutil.copytree(ROOT / directory, root / directory)
        for program in DOORS:
            shutil.copy(ROOT / program, root)
        # Heads and positions for which the recipes' own TP=8 and 4096 tokens are legal.
        make_toy(
            "llama",
            root / HF,
            num_hidden_layers=2,
            num_attention_heads=16,
            num_key_value_heads=8,
            max_position_embeddings=4096,
        )
        # Llama-2's special tokens, which its template needs.
        train_tokenizer(root / HF, 997)
        edit_config(root / HF, bos_token_id=1, eos_token_id=2, pad_token_id=None)
        (root / HF / "generation_config.json").unlink()
        (root / "dataset").mkdir()
        rows = [
            {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(1, n + 1)))}
            for n in range(2, 34)
        ]
        table = {key: [row[key] for row in rows] for key in rows[0]}
        table["text"] = [f"{row['instruction']} {row['output']} " * 8 for row in rows]
        pq.write_table(pa.table(table), root / PARQUET)

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        """Of a recipe: nothing of the caller's, and this repository's library."""
        kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        settings = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "WORKERS": "1"}
        return {**kept, **settings, **variables}

    def process(self, name: str, *flags: str, stdin: str = "", **variables: str) -> str:
        """Run a recipe as a user does; returns what it printed."""
        result = subprocess.run(
            ["bash", f"examples/mcore/llama2/{name}.sh", *flags],
            cwd=self.root,
            env=self.environment(variables),
            input=stdin,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert result.returncode == 0, result.stdout[-3000:]
        return result.stdout

    def here(self, name: str, *flags: str, **variables: str) -> None:
        """Run in this process what a one-process recipe would run in its own."""
        words = self.process(
            name, *flags, **{**variables, "PYTHON": str(ROOT / "examples/quickstart/print_words.sh")}
        ).split("\0")[:-1]
        world_size, program, *words = words
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.root)
            patch.setenv("WORLD_SIZE", world_size)
            assert importlib.import_module(f"mindspeed_llm.cli.{DOORS[program]}").main(words) == 0


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    return Clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def prepared(clone) -> Clone:
    """With data and weights converted: both in upstream's places."""
    clone.here("data_convert_llama2_pretrain")
    clone.here("data_convert_llama2_instruction")
    clone.here("ckpt_convert_llama2_hf2mcore")
    return clone


def test_data_lie_where_the_training_recipes_look(prepared):
    for name in ("dataset/alpaca_text_document", "finetune_dataset/alpaca_packed_labels_document"):
        assert (prepared.root / f"{name}.bin").stat().st_size > 0
        assert (prepared.root / f"{name}.idx").stat().st_size > 0


def test_weights_are_cut_for_eight_processes(prepared):
    assert len(list((prepared.root / "model_weights/Llama2-mcore").glob("iter_*/mp_rank_*"))) == 8


@pytest.mark.parametrize(
    "name, says",
    [
        ("ckpt_convert_llama2_hf2mcore", "model_weights/Llama2-mcore"),
        ("ckpt_convert_llama2_mcore2hf", "model_from_hf/llama-2-7b-hf"),
        ("pretrain_llama2_7b_ptd", "8 = tensor 1 x pipeline 2 x data 4"),
        ("tune_llama2_7b_full_ptd", "8 = tensor 8 x pipeline 1 x data 1"),
        ("tune_llama2_7b_lora_ptd", "8 = tensor 8 x pipeline 1 x data 1"),
        ("generate_llama2_7b_ptd", "1 = tensor 1 x pipeline 1 x data 1"),
        ("chat_llama2_7b_ptd", "1 = tensor 1 x pipeline 1 x data 1"),
    ],
)
def test_dry_run_shows_the_plan_with_every_default_as_it_is(prepared, name, says, capsys):
    prepared.here(name, DRY_RUN="1")
    assert says in capsys.readouterr().out
    assert not (prepared.root / "ckpt").exists()


@pytest.mark.parametrize(
    "name", ["pretrain_llama2_7b_ptd", "tune_llama2_7b_lora_ptd", "generate_llama2_7b_lora_ptd", "chat_llama2_7b_ptd"]
)
def test_dry_run_needs_no_model(clone, name, capsys):
    """As right after cloning: the plan is of Llama-2-7b as it is published."""
    nowhere = dict.fromkeys(("CKPT_LOAD_DIR", "CHECKPOINT", "CHECKPOINT_LORA"), "./not/converted/yet/")
    clone.here(name, DRY_RUN="1", **nowhere)
    said = capsys.readouterr().out
    assert "note: --load ./not/converted/yet/ is not there yet" in said and "6,738,415,616" in said


def test_pretrain_and_full_tuning_train(prepared, capfd):
    prepared.here("pretrain_llama2_7b_ptd", CKPT_SAVE_DIR="ckpt_pretrain", **SMALL, **ONE)
    prepared.here("tune_llama2_7b_full_ptd", CKPT_SAVE_DIR="ckpt_full", **SMALL, **ONE)
    assert capfd.readouterr().out.count("iteration        2/       2 |") == 2
    for directory in ("ckpt_pretrain", "ckpt_full"):
        assert (prepared.root / directory / "latest_checkpointed_iteration.txt").read_text().strip() == "2"


def test_export_goes_into_mg2hf_and_is_the_original(prepared):
    prepared.here("ckpt_convert_llama2_mcore2hf")
    original, export = prepared.root / HF, prepared.root / HF / "mg2hf"
    with safe_open(original / "model.safetensors", "pt") as a, safe_open(export / "model.safetensors", "pt") as b:
        assert set(a.keys()) == set(b.keys())
        assert all(a.get_tensor(key).equal(b.get_tensor(key)) for key in a.keys())


@pytest.mark.distributed
def test_lora_on_two_processes_and_a_chat_with_it(prepared):
    said = prepared.process("tune_llama2_7b_lora_ptd", NPROC_PER_NODE="2", TP="2", MASTER_PORT="6283", **SMALL)
    assert "iteration        2/       2 |" in said
    assert (prepared.root / "logs/tune_llama2_7b_lora_ptd.log").read_text() == said
    said = prepared.process("generate_llama2_7b_lora_ptd", stdin="hello\nq\n", MAX_NEW_TOKENS="4", **ONE)
    assert said.count("You >>") == 2
    assert "Greedy Search" in said
    assert (prepared.root / "logs/generate_llama2_7b_lora_ptd.log").read_text() == said


def test_base_model_answers_and_chats(prepared):
    said = prepared.process("generate_llama2_7b_ptd", "--task", "greedy", "--prompt", "Count to 3.", MAX_NEW_TOKENS="4")
    assert "You:\nCount to 3." in said
    said = prepared.process("chat_llama2_7b_ptd", stdin="hello\nq\n", MAX_NEW_TOKENS="4")
    assert said.count("You >>") == 2


def test_the_tokenizer_may_be_a_sentencepiece_file(clone, capsys):
    import sentencepiece

    sentences = [f"Count to {n}. {' '.join(map(str, range(n)))}" for n in range(200)]
    model = clone.root / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(model), vocab_size=300, byte_fallback=True, minloglevel=2
    )
    for variable in ("TOKENIZER_MODEL", "TOKENIZER_PATH"):
        prefix = f"with_{variable.lower()}/alpaca"
        clone.here("data_convert_llama2_instruction", **{variable: f"{model}.model", "OUTPUT_PREFIX": prefix})
        assert (clone.root / f"{prefix}_packed_input_ids_document.bin").stat().st_size > 0
