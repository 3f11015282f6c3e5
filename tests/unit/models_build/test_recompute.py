"""Parts of layers computed once more in the backward pass: the same bits, less memory, in the layers asked for."""

import functools
from unittest import mock

import pytest
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from mindspeed_llm.config.parser import parse
from mindspeed_llm.errors import UserError
from mindspeed_llm.models import recompute
from mindspeed_llm.models.build import BuildOptions, build_model
from mindspeed_llm.models.moe.options import ExpertOptions
from mindspeed_llm.models.recompute_options import ALL_LAYERS, RecomputeOptions
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.setup import initialize_distributed
from mindspeed_llm.plan.combinations import combination_problems
from mindspeed_llm.testing.held import held_bytes

torch.set_num_threads(1)
SIZES = (4, 48, 80, 6, 2, 12, 131, 256)
DENSE = ModelShape("llama", *SIZES, init_method_std=0.1)
EXPERTS = ModelShape(
    "qwen_moe", *SIZES, init_method_std=0.1, num_moe_experts=4, moe_ffn_hidden_size=40, moe_router_topk=2,
    moe_shared_expert_intermediate_size=56, moe_shared_expert_gate=True,
)  # fmt: skip
LATENT = ModelShape(
    "deepseek", 4, 48, 80, 6, 6, 20, 131, 256, init_method_std=0.1, multi_latent_attention=True, q_lora_rank=24,
    kv_lora_rank=16, qk_head_dim=12, qk_pos_emb_head_dim=8, v_head_dim=10, rotary_interleaved=True,
)  # fmt: skip
SHAPES = {"dense": DENSE, "experts": EXPERTS, "latent": LATENT}
ALL = ALL_LAYERS
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
PARTS = {
    "norms": ("dense", dict(norm=ALL)),
    "activations": ("dense", dict(activation=ALL)),
    "both in some layers": ("dense", dict(activation=3, norm=1)),
    "norms before experts": ("experts", dict(norm=ALL)),
    "activations of experts": ("experts", dict(activation=ALL)),
    "activations of routed experts": ("experts", dict(expert_activation=ALL)),
    "experts": ("experts", dict(experts=ALL)),
    "layers of experts": ("experts", dict(expert_layer=2)),
    "all of experts": ("experts", dict(norm=ALL, experts=2, activation=ALL)),
    "latents up": ("latent", dict(latent="up")),
    "latent attention": ("latent", dict(latent="all", norm=ALL, activation=ALL)),
}


@pytest.fixture(scope="module", autouse=True)
def parallel_state():
    initialize_distributed()


def ids(seed):
    return torch.randint(0, 131, (2, 16), generator=torch.Generator().manual_seed(seed))


DROPOUT = dict(hidden_dropout=0.1, attention_dropout=0.1)
# Without dropout the norm before the MLP is computed with the sum it normalises.
HALF = dict(params_dtype=torch.bfloat16)


def run(shape, grouped=True, frozen="", **options):
    """(loss, gradients by name, bytes kept for them) of one micro-batch; in fp32 with dropout."""
    experts = ExpertOptions(grouped_gemm=grouped) if shape.num_moe_experts else ExpertOptions()
    options = options if "params_dtype" in options else DROPOUT | options
    model = build_model(shape, BuildOptions(experts=experts, **options))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen in name)
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    torch.manual_seed(5)
    loss, held = held_bytes(lambda: model(ids(1), labels=ids(2)), model.parameters())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, held


@functools.cache
def plain(name, grouped=True, frozen="", half=False):
    """The same without recomputation."""
    return run(SHAPES[name], grouped, frozen, **(HALF if half else {}))


# Experts are computed in two ways.
CASES = [(part, way) for part, (name, _) in PARTS.items() for way in (True, False) if way or name == "experts"]


@pytest.mark.parametrize("frozen", ["", "linear_fc2"], ids=["all trained", "second linears trained"])
@pytest.mark.parametrize("part, grouped", CASES)
def test_the_same_bits_from_less_memory(part, grouped, frozen):
    name, options = PARTS[part]
    shape = SHAPES[name]
    frozen = "weight2" if frozen and grouped and shape.num_moe_experts else frozen
    loss, gradients, held = plain(name, grouped, frozen)
    found, others, less = run(shape, grouped, frozen, recompute=RecomputeOptions(**options))
    assert torch.equal(found, loss) and gradients.keys() == others.keys() and gradients
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())
    # What comes before the first trained weight keeps nothing, unless it is to be recomputed.
    assert less < held or frozen


@pytest.mark.parametrize("part", PARTS)
def test_the_same_bits_in_bf16(part):
    """Gradients are rounded where they are without recomputation, and no more often."""
    name, options = PARTS[part]
    loss, gradients, held = plain(name, half=True)
    found, others, less = run(SHAPES[name], recompute=RecomputeOptions(**options), **HALF)
    assert torch.equal(found, loss) and less < held
    assert not [name for name, gradient in gradients.items() if not torch.equal(gradient, others[name])]


def test_a_gradient_that_is_rounded_twice_is_noticed():
    """Negative control: the norm before the MLP is computed behind its sum instead of with it."""
    from mindspeed_llm.models.norm import RMSNorm

    _, gradients, _ = plain("dense", half=True)
    with mock.patch.object(RMSNorm, "of_sum", lambda self, x, residual: x + residual):
        _, others, _ = run(DENSE, recompute=RecomputeOptions(norm=ALL), **HALF)
    assert any(not torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_a_result_that_is_not_made_again_is_noticed():
    """Negative control: the memory is given back and filled with nothing."""
    from megatron.core.tensor_parallel import CheckpointWithoutOutput

    _, gradients, _ = plain("dense")
    original = CheckpointWithoutOutput._recompute

    def forgetful(self, gradient):
        outputs = self.outputs
        original(self, gradient)
        for output in outputs or ():
            output.untyped_storage().fill_(0)

    with mock.patch.object(CheckpointWithoutOutput, "_recompute", forgetful):
        _, others, _ = run(DENSE, recompute=RecomputeOptions(activation=ALL))
    assert not torch.equal(
        gradients["decoder.layers.0.mlp.linear_fc2.weight"], others["decoder.layers.0.mlp.linear_fc2.weight"]
    )


MLPS = dict(recompute_granularity="selective", recompute_modules=["mlp"])


@pytest.mark.parametrize("frozen", ["", "linear_fc2"], ids=["all trained", "second linears trained"])
def test_norms_before_mlps_that_are_recomputed_as_a_whole(frozen):
    """The same bits from less memory than either alone."""
    loss, gradients, held = plain("dense", frozen=frozen)
    found, others, less = run(DENSE, frozen=frozen, recompute=RecomputeOptions(norm=ALL), **MLPS)
    assert torch.equal(found, loss) and gradients.keys() == others.keys() and gradients
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())
    assert less < run(DENSE, frozen=frozen, **MLPS)[2] < held or frozen


def test_a_norm_dropped_inside_of_what_is_recomputed_is_noticed():
    """Negative control: no gradient's hook fills it again."""
    with mock.patch("mindspeed_llm.models.layer._dropping", inside):
        with pytest.raises(RuntimeError, match="not allocated"):
            run(DENSE, recompute=RecomputeOptions(norm=ALL), **MLPS)


def inside(norm, sums):
    """megatron's bias-dropout-add, before which the norm's output is dropped where nothing has a gradient."""

    def add_of(training, fused):
        def add(output_and_bias, *others):
            with torch.no_grad():
                norm.drop(output_and_bias[0].detach())
            norm.drop = lambda later: None
            return sums(training, fused)(output_and_bias, *others)

        return add

    return add_of


def test_less_is_kept_the_more_layers_recompute():
    kept = [run(DENSE, recompute=RecomputeOptions(activation=layers))[2] for layers in (0, 1, 3, 4, ALL)]
    assert kept[0] > kept[1] > kept[2] > kept[3] == kept[4]
    assert kept[0] - kept[3] == 4 * (32 * 80 * 4)  # layers x tokens x ffn_hidden_size x fp32


def test_layers_recomputed_as_a_whole_keep_less():
    """One, three and all of four layers; core attention of all."""
    block = dict(recompute_granularity="full", recompute_method="block")
    ways = {
        "core attention": dict(recompute_granularity="selective"),
        "one": block | dict(recompute_num_layers=1),
        "three": block | dict(recompute_num_layers=3),
        "all": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    }
    loss, gradients, held = plain("dense")
    kept = {}
    for name, way in ways.items():
        found, others, kept[name] = run(DENSE, **way)
        assert torch.equal(found, loss) and all(torch.equal(gradients[name], others[name]) for name in gradients)
    assert kept["core attention"] < held
    assert held > kept["one"] > kept["three"] > kept["all"] and kept["all"] < held / 2


def test_layers_are_counted_behind_those_recomputed_as_a_whole():
    whole = dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=2)
    options = BuildOptions(**whole, recompute=RecomputeOptions(norm=1, activation=ALL))
    layers = build_model(DENSE, options).decoder.layers
    assert [layer.input_layernorm.recomputed for layer in layers] == [False, False, True, False]
    assert [layer.mlp.recompute_activation for layer in layers] == [False, False, True, True]
    _, gradients, held = plain("dense")
    _, others, less = run(DENSE, **whole, recompute=options.recompute)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients) and less < held


def test_numbers_of_a_rank_are_used_up_chunk_by_chunk(monkeypatch):
    """Two chunks of two layers: layers 0, 1 and 4, 5 of eight over two ranks, the first of them."""
    monkeypatch.setattr(recompute, "get_num_layers_to_build", lambda config, stage: 2)
    monkeypatch.setattr(recompute, "get_transformer_layer_offset", lambda config, stage: 4 * stage)
    per_rank = RecomputeOptions(activation=1, per_rank=True)
    config = mock.Mock(
        recompute=per_rank, recompute_granularity="full", recompute_method="block", recompute_num_layers=1
    )
    numbers = [(number, stage) for stage, first in ((0, 1), (1, 5)) for number in (first, first + 1)]
    assert [recompute.is_chosen(config, *place, 1) for place in numbers] == [False, True, False, False]
    assert [recompute.is_chosen(config, *place, 2) for place in numbers] == [False, True, True, False]
    config.recompute = RecomputeOptions(activation=1)
    assert [recompute.is_chosen(config, *place, 1) for place in numbers] == [False, True, False, True]
    for count, expected in ((1, [1, 0]), (3, [3, 1])):
        config.recompute, config.recompute_num_layers, found = per_rank, count, []
        for stage in (0, 1):
            decoder = mock.Mock()
            recompute.count_over_rank(decoder, config, stage)
            found.append(decoder.config.recompute_num_layers)
        assert found == expected


@pytest.mark.parametrize(
    "words, problem",
    [
        ("--recompute-norm-num-layers 2", "no meaning without --recompute-norm"),
        ("--moe-zero-memory-num-layers 2", "no meaning without --moe-zero-memory"),
        ("--recompute-modules layernorm", "--recompute-granularity selective only"),
        (f"{FULL} --recompute-norm", "legal: --recompute-method block"),
        ("--recompute-granularity selective --recompute-modules layernorm --recompute-norm", "say the same"),
        ("--mla-zero-memory --recompute-mla-up-proj", "give one"),
        ("--enable-recompute-layers-per-pp-rank", "without a number of layers"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(words, problem):
    try:
        problems = combination_problems(parse("pretrain", words.split()).config)
    except UserError as wrong:
        problems = [str(wrong)]
    assert any(problem in line for line in problems), problems
