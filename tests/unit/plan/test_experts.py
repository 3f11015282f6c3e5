"""What is asked of experts is refused in one line when the model or the layout cannot have it."""

import pytest

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.config.experts import layer_pattern
from mindspeed_llm.config.parser import parse
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.plan import resolve

FLAGS = (
    "--num-layers 4 --hidden-size 48 --ffn-hidden-size 80 --num-attention-heads 4 --normalization RMSNorm --swiglu "
    "--disable-bias-linear --vocab-size 997 --train-iters 1 --global-batch-size 8 --num-experts 4 "
)
BIASED = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "


def planned(words, door="pretrain", world="4"):
    parsed = parse(door, words.split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", world)
        return resolve(parsed.config, parsed.problems)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    fields = dict(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
    return make_toy("qwen3_moe", tmp_path_factory.mktemp("moe") / "toy", mlp_only_layers=[1], **fields)


def test_a_shape_from_flags():
    shape = planned(
        FLAGS + BIASED + "--moe-layer-freq [0]*1+[1]*3 --moe-router-topk 3 --moe-intermediate-size 24 "
        "--moe-shared-expert-intermediate-size 40 --moe-router-num-groups 2 --moe-router-group-topk 2"
    ).shape
    assert (shape.num_moe_experts, shape.moe_layers, shape.moe_router_topk) == (4, (1, 2, 3), 3)
    assert shape.moe_ffn_hidden_size == 24 and shape.moe_router_enable_expert_bias
    assert [shape.is_moe_layer(i) for i in range(4)] == [False, True, True, True]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--expert-model-parallel-size 3", "num_moe_experts 4 % expert parallel 3 = 0 does not hold; legal: 1, 2, 4"),
        ("--tensor-model-parallel-size 2", "--sequence-parallel is missing"),
        ("--moe-router-topk 1", "--moe-router-pre-softmax is missing"),
        ("--moe-router-topk 5", "--moe-router-topk: 5 is more than --num-experts 4"),
        ("--moe-router-num-groups 2", "need each other"),
        ("--moe-router-enable-expert-bias", "--moe-router-score-function sigmoid is missing"),
        ("--moe-layer-freq [1]*3", "describes 3 layers and the model has 4"),
        ("--moe-layer-freq print()", "--moe-layer-freq: print.. is wrong"),
        ("--moe-aux-loss-coeff 0.1 0.2", "2 values for 1 kinds"),
        ("--moe-token-drop-policy position", "no meaning without --moe-expert-capacity-factor"),
        ("--moe-router-bias-update-rate 0.1", "no meaning for a model without score biases"),
        (
            "--moe-token-dispatcher-type allgather --pipeline-model-parallel-size 2",
            "allgather does not go",
        ),
        ("--moe-shared-expert-gate", "--moe-shared-expert-intermediate-size is missing"),
    ],
)
def test_what_does_not_fit_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        planned(FLAGS + words)


def test_rows_of_different_lengths_cannot_be_gathered(toy):
    words = f"--load {toy} --train-iters 1 --global-batch-size 8 --moe-token-dispatcher-type allgather "
    assert planned(words, "posttrain").layout.ep == 1
    with pytest.raises(UserError, match="allgather needs rows of one length"):
        planned(words + "--expert-model-parallel-size 2", "posttrain")


def test_adapters_go_to_attention_and_to_experts(toy):
    words = f"--load {toy} --train-iters 1 --global-batch-size 8 --lora-r 4 "
    few = planned(words + "--lora-target-modules q_proj linear_proj", "posttrain").adapters
    assert set(few.targets) == {"linear_qkv", "linear_proj"}
    assert {"experts.linear_fc1", "experts.linear_fc2"} < set(planned(words, "posttrain").adapters.targets)


def test_a_dense_model_refuses_options_of_experts(toy_llama):
    words = f"--load {toy_llama} --train-iters 1 --global-batch-size 8 "
    with pytest.raises(UserError, match="--moe-grouped-gemm: no meaning for a model without experts"):
        planned(words + "--moe-grouped-gemm")
    with pytest.raises(UserError, match="the model has experts for expert parallel 2"):
        planned(words + "--expert-model-parallel-size 2")


def test_options_that_repeat_the_model_may_be_given_and_others_contradict(toy):
    words = f"--load {toy} --train-iters 1 --global-batch-size 8 --num-experts 4 --moe-layer-freq "
    assert planned(words + "[1]*1+[0]*1").shape.moe_layers == (0,)
    with pytest.raises(UserError, match="--moe-layer-freq: 1 contradicts"):
        planned(words + "1")
    with pytest.raises(UserError, match="--num-experts: 8 contradicts .* which says 4"):
        planned(words.replace("--num-experts 4", "--num-experts 8") + "[1]*1+[0]*1")


def test_layer_patterns():
    assert layer_pattern("2", 4) == [True, False, True, False]
    assert layer_pattern("([0]*1 + [1]*2 + [0])", 4) == [False, True, True, False]


@pytest.mark.parametrize(
    "flags", ["--moe-zero-memory level0", "--recompute-granularity selective --recompute-modules moe"]
)
def test_a_dense_model_refuses_to_recompute_experts(toy_llama, flags):
    words = f"--load {toy_llama} --train-iters 1 --global-batch-size 8 "
    with pytest.raises(UserError, match="no meaning for a model without experts"):
        planned(words + flags)
    with pytest.raises(UserError, match="no meaning for a model without latent attention"):
        planned(words + "--mla-zero-memory")
    with pytest.raises(UserError, match="no meaning for a model without shared experts"):
        planned(words + "--recompute-granularity selective --recompute-modules shared_experts")
    assert planned(words + "--recompute-granularity selective --recompute-modules mlp layernorm") is not None
