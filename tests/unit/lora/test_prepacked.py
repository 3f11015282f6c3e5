"""Frozen weights laid out for their products: bit for bit the same training, in the memory that the plan says."""

import pytest
import torch
from torch import nn

from mindspeed_llm.accelerator import host_products
from mindspeed_llm.config.parser import parse
from mindspeed_llm.lora import layers, prepacked
from mindspeed_llm.plan.combinations import combination_problems
from mindspeed_llm.plan.plan import resolve
from mindspeed_llm.plan.show import adapter_line, stages_memory
from mindspeed_llm.training import setup

needs_bf16_products = pytest.mark.skipif(host_products.why_not() is not None, reason=str(host_products.why_not()))
RUN = (
    "--stage sft --prompt-type chatml --seq-length 128 --lr 2e-2 --lr-decay-style constant --global-batch-size 4 "
    "--micro-batch-size 2 --split 1 --train-iters 2 --lora-r 4 --progress lines --num-threads 1 --bf16"
)


@needs_bf16_products
@pytest.mark.parametrize("rows", (1, 7, 300))
def test_products_are_those_of_the_weight_itself(rows):
    torch.manual_seed(0)
    x, grad = torch.randn(rows, 96).bfloat16().requires_grad_(), torch.randn(rows, 160).bfloat16()
    weight, bias = nn.Parameter(torch.randn(160, 96).bfloat16(), requires_grad=False), torch.randn(160).bfloat16()
    plain, laid_out = nn.functional.linear(x, weight, bias), prepacked.PrepackedWeight(weight).product(x, bias)
    (one,), (other,) = (torch.autograd.grad(y, x, grad) for y in (plain, laid_out))
    # A sum may be taken in another order, and half a unit of bf16 tips to the other side.
    torch.testing.assert_close(laid_out, plain, rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(other, one, rtol=2**-7, atol=1e-2)
    assert not torch.allclose(prepacked.PrepackedWeight(weight.flip(0)).product(x, bias), plain, rtol=0.1, atol=1.0)


@needs_bf16_products
def test_a_weight_that_was_written_to_is_laid_out_anew():
    weight = nn.Parameter(torch.randn(32, 16).bfloat16(), requires_grad=False)
    first = prepacked.PrepackedWeight(weight)
    assert first.is_of(weight)
    with torch.no_grad():
        weight.mul_(2)
    assert not first.is_of(weight)
    moved = nn.Parameter(weight.detach().clone(), requires_grad=False)
    assert not prepacked.PrepackedWeight(weight).is_of(moved)


def losses_of(capsys):
    return [piece.split("|")[0] for piece in capsys.readouterr().out.split("lm loss: ")[1:]]


@needs_bf16_products
def test_training_is_the_same(toy_llama, rows, post_train, capsys, monkeypatch):
    words = f"{RUN} --load {toy_llama} --data-path {rows}"
    post_train(words)
    plain = losses_of(capsys)
    post_train(words, "--lora-prepack")
    assert len(plain) == 2 and losses_of(capsys) == plain
    # Were nothing laid out, what is laid out wrongly would change nothing.
    right = prepacked._multiply
    monkeypatch.setattr(prepacked, "_multiply", lambda *given: right(*given).neg())
    post_train(words, "--lora-prepack")
    assert losses_of(capsys) != plain


def planned(words):
    return resolve(parse("posttrain", words.split()).config, [])


@needs_bf16_products
def test_the_plan_counts_what_is_laid_out(toy_llama, rows):
    words = f"{RUN} --load {toy_llama} --data-path {rows} --lora-target-modules linear_qkv linear_fc2"
    without, plan = planned(words), planned(f"{words} --lora-prepack")
    assert "laid out" in adapter_line(plan) and "laid out" not in adapter_line(without)
    (one,), (other,) = stages_memory(without), stages_memory(plan)
    setup.start_processes(plan)
    model = setup.build(plan).chunks[0]
    kept = [m for m in model.modules() if isinstance(m, layers.LoraMixin)]
    assert kept and other.weights - one.weights == sum(4 * m.weight.numel() for m in kept)
    assert all(m.prepacked() is m.prepacked() is not None for m in kept)


@pytest.mark.parametrize(
    "words, said",
    (
        ("--lora-r 4", "--lora-prepack needs --bf16"),
        ("--lora-r 4 --bf16 --no-lora-fusion", "--lora-prepack has no meaning with --no-lora-fusion"),
        ("--lora-r 4 --bf16 --qlora", "--lora-prepack does not go with --qlora"),
        ("--lora-r 4 --bf16 --tensor-model-parallel-size 2", "--lora-prepack needs --tensor-model-parallel-size 1"),
        ("--bf16", "lora-prepack: no meaning without --lora-r"),
        ("--lora-r 4 --bf16 --device cuda", "--lora-prepack has a meaning on a CPU only"),
    ),
)
def test_where_it_has_no_meaning_it_is_refused(words, said):
    problems = combination_problems(parse("posttrain", f"{words} --lora-prepack".split()).config)
    assert [line for line in problems if said in line]
    without = combination_problems(parse("posttrain", words.split()).config)
    assert not [line for line in without if "prepack" in line]


def test_a_processor_without_such_products_is_named(monkeypatch):
    monkeypatch.setattr(host_products, "why_not", lambda: "oneDNN multiplies no bf16")
    problems = combination_problems(parse("posttrain", "--lora-r 4 --bf16 --device cpu --lora-prepack".split()).config)
    assert any("oneDNN multiplies no bf16; try: --no-lora-prepack" in line for line in problems)
