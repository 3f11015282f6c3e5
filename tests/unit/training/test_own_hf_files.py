"""A model whose shape came from flags is exported like one that came from Hugging Face."""

import json

import pytest

from mindspeed_llm.checkpoint.convert import convert
from mindspeed_llm.checkpoint.verify import verify
from mindspeed_llm.errors import UserError

FLAGS = (
    "--num-layers 2 --hidden-size 48 --ffn-hidden-size 80 --num-attention-heads 6 --group-query-attention "
    "--num-query-groups 2 --kv-channels 16 --max-position-embeddings 128 --normalization RMSNorm --swiglu "
    "--disable-bias-linear --untie-embeddings-and-output-weights --norm-epsilon 1e-5 --rotary-base 50000 "
    "--seq-length 64 --train-iters 1 --global-batch-size 2 --split 90,10 --eval-iters 0 --num-threads 1 "
)


def test_a_model_from_flags_computes_in_transformers_what_it_computed_here(door, corpus, toy_llama, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved, exported = tmp_path / "saved", tmp_path / "exported"
    door(
        "pretrain",
        FLAGS,
        f"--tokenizer-name-or-path {toy_llama} --data-path {corpus} --save {saved} --init-method-std 0.2",
    )
    convert(saved, exported, save_type="hf", quiet=True)
    model, loading = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokenizer, own = (AutoTokenizer.from_pretrained(place) for place in (exported, toy_llama))
    text = "What is a class? A tuple of bases."
    assert tokenizer(text)["input_ids"] == own(text)["input_ids"]
    assert model.generation_config.eos_token_id == own.eos_token_id
    assert verify(exported, saved).passed
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}))
    with pytest.raises(UserError, match="rotary_base"):
        convert(saved, tmp_path / "again", save_type="hf", hf_cfg_dir=exported, quiet=True)


def test_it_is_exported_at_the_end_of_its_training_too(door, corpus, toy_llama, tmp_path):
    words = f"--tokenizer-name-or-path {toy_llama} --data-path {corpus} --save {tmp_path}"
    door("pretrain", FLAGS, words, "--save-hf")
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "hf").iterdir()
    }
