"""Plans of any size on one machine: seconds for thousands of ranks, and one rank of them built and stepped here."""

import json
import time

import pytest

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.cli.training import run_door
from mindspeed_llm.config.parser import parse
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.plan import resolve
from mindspeed_llm.training.check_rank import check_rank, small_plan

EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "head_dim": 128,
    "num_hidden_layers": 46, "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 151936, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
    "initializer_range": 0.02, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
LARGE = (
    "--train-iters 5 --bf16 --seq-length 4096 --global-batch-size 8192 --use-distributed-optimizer --sequence-parallel "
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --context-parallel-size 2 "
    "--num-layers-per-virtual-pipeline-stage 6 --noop-layers 46,47 --expert-model-parallel-size 16 "
    "--expert-tensor-parallel-size 1"
)


@pytest.fixture
def experts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(EXPERTS))
    return tmp_path


def plan_of(directory, words):
    parsed = parse("pretrain", f"--hf-config {directory} --dry-run {words}".split())
    return resolve(parsed.config, parsed.problems)


def test_sixteen_thousand_ranks_are_planned_in_seconds(experts, capsys):
    start = time.process_time()  # other work on the machine does not count
    run_door(parse("pretrain", f"--hf-config {experts} --dry-run --world-size 16384 {LARGE}".split()))
    assert time.process_time() - start < 10
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "16384 = tensor 2 x pipeline 4 x context 2 x data 1024",
        "8192 = micro batch 1 x data parallel 1024 x 8 accumulation steps",
        "128 over expert parallel 16 (8 each) x expert tensor 1, 256 replicas",
        "embedding, 0-5 | 24-29",
        "42-45, 2 no-op, head",
        "GiB",
    ):
        assert part in out, part


@pytest.mark.slow
def test_a_rank_of_a_large_run_is_built_and_stepped_here(experts, capsys):
    (experts / "config.json").write_text(json.dumps({**EXPERTS, "num_hidden_layers": 14}))
    words = LARGE.replace("46,47", "14,15").replace("stage 6", "stage 2")
    run_door(parse("pretrain", f"--hf-config {experts} --dry-run --world-size 1024 --check-rank 777 {words}".split()))
    out = capsys.readouterr().out
    assert "rank 777:" in out and "as planned" in out and "took one step" in out


@pytest.mark.slow
def test_a_rank_of_a_qlora_run_is_built_and_stepped_here(tmp_path, capsys):
    """The full-size part counts its weights in NF4; the narrow one, whose rows are too short for blocks, is dense."""
    sizes = dict(hidden_size=128, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    model = make_toy("llama", tmp_path / "llama", **sizes)
    words = (
        f"--load {model} --data-path rows.json --train-iters 1 --global-batch-size 4 --seq-length 64 --qlora "
        "--lora-r 4 --lora-target-modules q_proj v_proj down_proj --use-dora --lora-dropout 0.1 "
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 --dry-run "
        "--world-size 8 --check-rank 5"
    )
    run_door(parse("posttrain", words.split()))
    out = capsys.readouterr().out
    assert "rank 5:" in out and "as planned" in out and "took one step" in out and "NF4" in out


def test_ranks_that_do_not_exist_are_refused(experts):
    with pytest.raises(UserError, match="--check-rank: 64 is wrong; legal: 0..63"):
        check_rank(plan_of(experts, f"--world-size 64 {LARGE}"), 64)


def test_a_small_plan_keeps_the_layout(experts):
    plan = plan_of(experts, f"--world-size 64 {LARGE}")
    small = small_plan(plan)
    assert small.layout == plan.layout
    assert small.shape.num_layers == 46 and small.shape.num_moe_experts == 128 and small.shape.num_query_groups == 4
    assert small.shape.num_parameters() < plan.shape.num_parameters() / 1000
    assert small.num_micro_batches == 4 and small.seq_length % 8 == 0


def test_sizes_are_for_dry_runs_alone(experts):
    for words in ("--world-size 4", "--check-rank 0"):
        parsed = parse("pretrain", f"--hf-config {experts} --train-iters 1 {words}".split())
        with pytest.raises(UserError, match="have a meaning with --dry-run only"):
            resolve(parsed.config, parsed.problems)
