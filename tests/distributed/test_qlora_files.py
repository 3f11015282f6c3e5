"""Weights in NF4 in mp_rank files: training from them is training on what is quantised on loading, to the bit.

And what a QLoRA run writes: the merged model of `--save-hf`.
"""

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.layouts import make_rows, train
from mindspeed_llm.testing.pool import pool

pytestmark = pytest.mark.distributed

DENSE = dict(hidden_size=128, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4, head_dim=16)
EXPERTS = dict(moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1)
BATCH = "--no-padding-free --micro-batch-size 2 --lora-r 4 --qlora "
ROWS = make_rows(4)
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
# model -> how its files are cut
FILES = {"llama": dict(tp=2, pp=2), "qwen3_moe": dict(tp=2, ep=2)}
LAYOUTS = {
    "one": ("llama", 1, ""),
    "tensor": ("llama", 2, TENSOR),
    "pipeline": ("llama", 2, "--pipeline-model-parallel-size 2"),
    "interleaved": ("llama", 2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "context": ("llama", 2, "--context-parallel-size 2"),
    "experts": ("qwen3_moe", 2, "--expert-model-parallel-size 2"),
    "experts, stacked": ("qwen3_moe", 2, "--expert-model-parallel-size 2 --moe-grouped-gemm"),
    "tensor in experts": ("qwen3_moe", 2, TENSOR),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (Hugging Face directory, the same in NF4 in mp_rank files)."""
    from mindspeed_llm.checkpoint.convert import convert
    from mindspeed_llm.checkpoint.expert_files import ExpertLayout

    root, made = tmp_path_factory.mktemp("nf4"), {}
    for name, extra in (("llama", {}), ("qwen3_moe", dict(EXPERTS, mlp_only_layers=[], norm_topk_prob=True))):
        layers = 4 if name == "llama" else 2
        directory = make_toy(name, root / name, num_hidden_layers=layers, **DENSE, **extra)
        cut = dict(FILES[name])
        experts = ExpertLayout(cut.pop("ep")) if "ep" in cut else None
        convert(directory, root / f"{name}-mg", experts=experts, quantize=True, quiet=True, **cut)
        made[name] = (str(directory), str(root / f"{name}-mg"))
    return made


def same(found, expected):
    """Whether two trainings agree to the bit."""
    pairs = [(found.weights, expected.weights), *zip(found.gradients, expected.gradients, strict=True)]
    assert all(a.keys() == b.keys() for a, b in pairs) and len(pairs) == 4
    equal = all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)
    return equal and found.losses == expected.losses


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_in_nf4_train_as_what_is_quantised_on_loading(layout, models):
    name, size, flags = LAYOUTS[layout]
    quantised_on_loading, from_files = (pool(size).run(train, d, BATCH + flags, ROWS)[0] for d in models[name])
    assert same(from_files, quantised_on_loading)


def test_the_comparison_notices_one_code(models):
    [path] = Path(models["llama"][1]).glob("iter_*/mp_rank_01_001/model_optim_rng.pt")
    content = torch.load(path, weights_only=False)
    name = "decoder.layers.1.mlp.linear_fc1.weight.nf4_codes"
    assert content["model"][name].dtype == torch.uint8
    kept = path.read_bytes()
    content["model"][name][3, 5] ^= 1
    torch.save(content, path)
    manifest = path.parents[1] / "manifest.json"
    record = manifest.read_text()
    try:
        from mindspeed_llm.checkpoint.manifest import write_manifest

        write_manifest(path.parents[1])
        found, expected = (pool(1).run(train, d, BATCH, ROWS)[0] for d in reversed(models["llama"]))
        assert not same(found, expected)
    finally:
        path.write_bytes(kept)
        manifest.write_text(record)


def tune(words, cache):
    """The posttrain door on this rank."""
    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse

    world = str(torch.distributed.get_world_size())
    here = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "RANK": str(torch.distributed.get_rank())}
    with mock.patch.dict(os.environ, here | {"MINDSPEED_LLM_CACHE": cache}):
        run_door(parse("posttrain", words.split()))


@torch.no_grad()
def logits(directory, adapters=None):
    """fp32 logits of some tokens, of our model or (without adapters) of transformers'."""
    ids = torch.randint(0, 997, (2, 24), generator=torch.Generator().manual_seed(3))
    if adapters is None:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(input_ids=ids).logits
    from mindspeed_llm import load_model

    return load_model(directory, adapters, dtype="fp32", device="cpu").model(ids, gather_logits=True)


@pytest.mark.parametrize("files", [0, 1], ids=["quantised on loading", "mp_rank files in NF4"])
@pytest.mark.parametrize("into", ["dequantized", "original"])
def test_save_hf_merges_into_the_base_that_is_asked_for(files, into, models, tmp_path):
    from safetensors import safe_open

    from mindspeed_llm.errors import UserError

    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": "Count.", "input": "", "output": "1 2 3"}] * 4))
    base = models["llama"][files]
    words = (
        f"--load {base} --stage sft --prompt-type chatml --data-path {rows} --seq-length 64 --split 1 --train-iters 2 "
        f"--global-batch-size 4 --progress lines --num-threads 1 --lr 1e-1 --save {tmp_path}/out "
        f"--save-hf --qlora-merge-base {into} {TENSOR} {BATCH}"
    )
    if (files, into) == (1, "original"):
        with pytest.raises(UserError, match="--qlora-merge-base: original is wrong, because .* is in NF4 itself"):
            pool(2).run(tune, words, str(tmp_path / "cache"))
        return
    pool(2).run(tune, words, str(tmp_path / "cache"))
    trained, merged = logits(base, tmp_path / "out"), logits(tmp_path / "out" / "hf")
    error = float((trained - merged).abs().max() / trained.abs().max())
    assert error < 1e-5 if into == "dequantized" else error > 1e-3
    with safe_open(tmp_path / "out" / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata()["merge_base"] == into
