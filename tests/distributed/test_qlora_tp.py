"""QLoRA under tensor, sequence and expert parallelism trains the adapters that one process trains."""

import pytest
import torch

from mindspeed_llm.testing.pool import pool

TARGETS = ["q_proj", "v_proj", "o_proj", "linear_fc1", "linear_fc2"]
DENSE = dict(hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
SIZES = {
    "llama": DENSE,
    "qwen3_moe": {
        **DENSE,
        "moe_intermediate_size": 128,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "deepseek_v2": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "q_lora_rank": 64,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "moe_intermediate_size": 128,
    },
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """directory(family) -> a Hugging Face model whose rows are whole blocks, also when cut in two."""
    from mindspeed_llm.checkpoint.toy import make_toy

    made = {}

    def of(family):
        if family not in made:
            made[family] = str(make_toy(family, tmp_path_factory.mktemp("toy") / family, **SIZES[family]))
        return made[family]

    return of


def batch():
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 997, (2, 12), generator=generator)
    labels = torch.randint(0, 997, (2, 12), generator=generator)
    labels[0, :2] = -100
    labels[1, 3:] = -100
    return ids, labels


def scales_of_own_slice(weights):
    """The mistake that this is about: a rank quantises what it holds as if that were the whole tensor."""
    from mindspeed_llm.ops.nf4_matrix import quantize_matrix

    for weight in weights.values():
        for index, matrix in enumerate(weight.matrices):
            weight.fill(quantize_matrix(matrix.dense(torch.float32) + 0.01), index)


def train(directory, targets, tp=1, ep=1, sequence_parallel=False, grouped=False, mutated=False):
    """Losses of three SGD steps: the third has seen every gradient that the first two left behind."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from mindspeed_llm.checkpoint.hf import HfSource
    from mindspeed_llm.checkpoint.load import Placement, load_into
    from mindspeed_llm.lora.inject import inject_adapters
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.models.moe.options import ExpertOptions
    from mindspeed_llm.models.nf4_weight import nf4_weights
    from mindspeed_llm.parallel.layer_map import layer_map
    from mindspeed_llm.parallel.setup import initialize_distributed
    from mindspeed_llm.plan.adapters import AdapterSettings, resolve_targets

    initialize_distributed(tensor_parallel_size=tp, expert_parallel_size=ep, expert_tensor_parallel_size=tp)
    from megatron.core import parallel_state

    source = HfSource(directory)
    options = BuildOptions(
        tensor_parallel_size=tp,
        expert_parallel_size=ep,
        expert_tensor_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        vocab_divisible_by=2,
        quantized_linears=True,
        experts=ExpertOptions(grouped_gemm=grouped),
        initialize=False,
    )
    model = build_model(source.shape, options)
    here = Placement(
        layer_map(source.shape.num_layers),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp=tp,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep=ep,
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp=tp,
    )
    load_into(model, source, here, quiet=True)
    if mutated:
        scales_of_own_slice(nf4_weights(model))
    model.requires_grad_(False)
    found = resolve_targets(targets, source.shape)
    inject_adapters(model, AdapterSettings(rank=4, alpha=8.0, dropout=0.0, targets=found.targets))
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    ids, labels = batch()
    losses = []
    for _ in range(3):
        wrapped.zero_grad_buffer()
        loss = wrapped(ids, labels=labels)
        loss.backward()
        tokens = (labels != -100).sum().int()
        losses.append(float(loss.detach()) / float(tokens))
        finalize_model_grads([wrapped], tokens.clone())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= 0.05 * parameter.main_grad
    return losses


@pytest.fixture(scope="module")
def one_process(directory):
    made = {}

    def losses(family, targets=tuple(TARGETS)):
        if (family, targets) not in made:
            made[family, targets] = pool(1).run(train, directory(family), list(targets))[0]
        return made[family, targets]

    return losses


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_train_on_the_base_of_one(directory, one_process, sequence_parallel):
    expected = one_process("llama")
    assert expected[2] < expected[0]
    for found in pool(2).run(train, directory("llama"), TARGETS, 2, 1, sequence_parallel):
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_comparison_notices_blocks_of_a_slice(directory, one_process):
    found = pool(2).run(train, directory("llama"), TARGETS, 2, 1, True, False, True)[0]
    assert found != pytest.approx(one_process("llama"), rel=1e-4)


ALL = ("all-linear",)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("tp, ep", [(1, 2), (2, 1)])
def test_experts_in_nf4_are_those_of_one_process(directory, one_process, tp, ep, grouped):
    expected = one_process("qwen3_moe", ALL)
    for found in pool(2).run(train, directory("qwen3_moe"), list(ALL), tp, ep, tp > 1, grouped):
        assert found == pytest.approx(expected, rel=1e-5)


def test_latent_attention_in_nf4_is_that_of_one_process(directory, one_process):
    expected = one_process("deepseek_v2", ALL)
    for found in pool(2).run(train, directory("deepseek_v2"), list(ALL), 2, 1, True):
        assert found == pytest.approx(expected, rel=1e-5)
