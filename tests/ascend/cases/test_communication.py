"""Products over ranks in one kernel (MC2): two processes over hccl, forward and backward, alone and in a model."""

import pytest
from cases.jobs import join_on_npu, run

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.pool import pool

KERNELS = {"npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"}


def products(rank, dtype, k):
    """Both products by the kernels and by the formula, and what ran."""
    import torch
    import torch.distributed as dist
    from simulator.kernels.registry import CALLS

    from mindspeed_llm import ops
    from mindspeed_llm.ops import parallel_matmul, registry

    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(rank)
    x, whole, weight = (torch.randn(*shape, generator=generator) for shape in ((3, 2, k), (6, 2, k), (5, k)))
    x, whole, weight = (t.to(dtype).npu() for t in (x, whole, weight))
    ops.load_all()
    registry.select("all_gather_matmul", "npu_all_gather_base_mm")
    registry.select("matmul_reduce_scatter", "npu_mm_reduce_scatter_base")
    CALLS.clear()
    y, gathered = parallel_matmul.all_gather_matmul(x, weight, dist.group.WORLD)
    turned, _ = parallel_matmul.all_gather_matmul(x, weight.t().contiguous().t(), dist.group.WORLD)
    summed = parallel_matmul.matmul_reduce_scatter(whole, weight, dist.group.WORLD)
    kernels = set(CALLS)
    expected = parallel_matmul.gather_then_multiply(x, weight, dist.group.WORLD, 1)
    total = parallel_matmul.multiply_then_scatter(whole, weight, dist.group.WORLD, 1)
    pairs = ((y, expected[0]), (turned, expected[0]), (gathered, expected[1]), (summed, total))
    found = [float((one.float() - other.float()).abs().max()) for one, other in pairs]
    registry.reset()
    return kernels, found, [list(x.shape) for x in (y, gathered, summed)]


def on_both(dtype, k):
    import torch.distributed as dist

    return products(dist.get_rank(), dtype, k)


@pytest.mark.parametrize(
    "dtype, k, kernels", [("bfloat16", 256, KERNELS), ("float32", 256, set()), ("float16", 255, set())]
)
def test_the_kernels_give_the_formulas_results(dtype, k, kernels):
    for ran, differences, shapes in pool(2, join_on_npu).run(on_both, dtype, k):
        assert ran == kernels
        assert max(differences) <= 0.25  # of sums of 256 products rounded to 8 bits; a wrong rank's row is off by 16
        assert shapes == [[6, 2, 5], [6, 2, k], [3, 2, 5]]


def refusals():
    """What the device says to calls it does not take."""
    import torch
    import torch.distributed as dist

    npu, group = torch.ops.npu, dist.group.WORLD
    name = group._get_backend(torch.device("npu")).get_hccl_comm_name(dist.get_rank())
    x, w = (torch.zeros(4, 256, dtype=torch.bfloat16).npu() for _ in range(2))
    calls = {
        "fp32": lambda: npu.npu_all_gather_base_mm(x.float(), w.t().float(), name, 2),
        "k": lambda: npu.npu_all_gather_base_mm(x[:, :8].contiguous(), w[:, :8].contiguous().t(), name, 2),
        "transposed": lambda: npu.npu_all_gather_base_mm(x.t().contiguous().t(), w.t(), name, 2),
        "ranks": lambda: npu.npu_all_gather_base_mm(x, w.t(), name, 3),
        "communicator": lambda: npu.npu_all_gather_base_mm(x, w.t(), "another", 2),
        "bias": lambda: npu.npu_mm_reduce_scatter_base(x, w.t(), name, 2, bias=torch.ones(4).bfloat16().npu()),
        "rows": lambda: npu.npu_mm_reduce_scatter_base(x[:3].contiguous(), w.t(), name, 2),
        "maximum": lambda: npu.npu_mm_reduce_scatter_base(x, w.t(), name, 2, reduce_op="max"),
    }
    said = {}
    for what, call in calls.items():
        try:
            call()
        except RuntimeError as error:
            said[what] = str(error)
    return sorted(said), sorted(calls)


def test_what_a_device_refuses_is_refused():
    for said, calls in pool(2, join_on_npu).run(refusals):
        assert said == calls


WIDE = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    import json

    folder = tmp_path_factory.mktemp("wide")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} and some words"}) + "\n" for i in range(40)))
    model = make_toy("llama", folder / "llama", **WIDE)
    words = "--train-iters 2 --lr 1e-3 --global-batch-size 2 --micro-batch-size 2 --seq-length 32 --eval-iters 0 --bf16"
    layout = "--tensor-model-parallel-size 2 --sequence-parallel"
    return f"{words} --split 1,0 --load {model} --data-path {folder / 'text.jsonl'} {layout}", str(folder / "cache")


def test_a_model_trains_by_the_kernels_as_in_parts(job):
    """--use-ascend-mc2 gives the losses of --use-ascend-coc, which computes the same by collectives."""
    words, cache = job
    by_kernel = pool(2, join_on_npu).run(run, "pretrain", f"{words} --use-ascend-mc2", cache, timeout=400)[-1]
    in_parts = pool(2, join_on_npu).run(run, "pretrain", f"{words} --use-ascend-coc", cache, timeout=400)[-1]
    assert by_kernel["kernels"] >= KERNELS and not in_parts["kernels"] & KERNELS
    assert by_kernel["train"] == pytest.approx(in_parts["train"], rel=1e-3)
    assert len(by_kernel["train"]) == 2


def test_fp32_and_chips_without_the_kernels_are_refused(job, monkeypatch):
    from mindspeed_llm.accelerator.npu import NPU
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.plan.combinations import combination_problems

    words = f"{job[0]} --use-ascend-mc2"
    assert combination_problems(parse("pretrain", words.split()).config) == []
    (said,) = combination_problems(parse("pretrain", words.replace("--bf16 ", "").split()).config)
    assert "needs --bf16 or --fp16" in said
    monkeypatch.setattr("torch.npu.get_device_name", lambda: "Ascend950PR")
    (said,) = combination_problems(parse("pretrain", words.split()).config)
    assert "this is Ascend950PR (A5)" in said
    assert NPU().ranks_of_fused_communication() == ()
    monkeypatch.setattr("torch.npu.get_device_name", lambda: "Ascend910_9391")
    assert NPU().ranks_of_fused_communication() == (2, 4, 8, 16)
