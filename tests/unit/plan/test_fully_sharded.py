"""--use-torch-fsdp2 in a plan: what is refused by name, what is shown, and the memory of a device."""

import pytest

from mindspeed_llm.cli.training import run_door
from mindspeed_llm.config.parser import parse
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.plan import resolve
from mindspeed_llm.plan.show import plan_memory
from mindspeed_llm.training.check_rank import check_rank

WORDS = "--train-iters 2 --seq-length 64 --global-batch-size 8 --world-size 4 --dry-run"


def plan_of(toy, words):
    parsed = parse("pretrain", f"--load {toy} {WORDS} {words}".split())
    return resolve(parsed.config, parsed.problems)


@pytest.mark.parametrize(
    "words, why",
    [
        ("--use-distributed-optimizer", "optimizer state is split already"),
        ("--overlap-grad-reduce", "reduced layer by layer"),
        ("--gradient-accumulation-fusion", "tensors of their own"),
        ("--fp16", "does not scale the loss"),
        ("--qlora --lora-r 4", "NF4 is not cut"),
        ("--log-local-norms", "no rank has the whole"),
        ("--swap-optimizer", "split over the ranks"),
        ("--pipeline-model-parallel-size 2", "2 is wrong with --use-torch-fsdp2"),
        ("--expert-model-parallel-size 2", "legal: 1; try: --use-distributed-optimizer"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(toy_llama, words, why):
    with pytest.raises(UserError) as refused:
        plan_of(toy_llama, f"--use-torch-fsdp2 {words}")
    flag = words.split()[0]
    assert any(flag in line and why in line for line in str(refused.value).splitlines()), refused.value


def test_its_own_option_has_no_meaning_alone(toy_llama):
    with pytest.raises(UserError, match="--torch-fsdp2-no-reshard-after-forward has a meaning with --use-torch-fsdp2"):
        plan_of(toy_llama, "--torch-fsdp2-no-reshard-after-forward")


def test_the_dry_run_shows_it(toy_llama, capsys):
    run_door(parse("pretrain", f"--load {toy_llama} {WORDS} --use-torch-fsdp2".split()))
    row = next(line for line in capsys.readouterr().out.splitlines() if "fully sharded (FSDP2)" in line)
    assert "over 4 processes" in row


@pytest.mark.parametrize("precision, shared", [("", 12), ("--bf16", 16)])
def test_each_device_has_its_share_and_what_is_gathered(toy_llama, precision, shared):
    """Weights, gradients and moments are 16 bytes of a parameter over the ranks, whatever the type of the products."""
    plan = plan_of(toy_llama, f"--use-torch-fsdp2 {precision}")
    parameters = plan.shape.num_parameters()
    padding = (plan.padded_vocab_size - plan.shape.vocab_size) * plan.shape.hidden_size * 2
    found = plan_memory(plan)
    assert found.weights + found.gradients + found.optimizer == 16 * (parameters + padding) // 4
    kept = plan_memory(plan_of(toy_llama, f"--use-torch-fsdp2 --torch-fsdp2-no-reshard-after-forward {precision}"))
    whole = plan_memory(plan_of(toy_llama, precision))
    assert whole.temporary < found.temporary < kept.temporary
    assert whole.activations == found.activations
    split = plan_memory(plan_of(toy_llama, f"--use-distributed-optimizer {precision}"))
    assert split.optimizer == (shared - 4) * (parameters + padding) // 4


def test_frozen_weights_are_cut_in_the_type_of_the_products(toy_llama):
    plan = plan_of(toy_llama, "--use-torch-fsdp2 --bf16 --lora-r 4")
    found, trained = plan_memory(plan), plan.trainable_parameters()
    assert found.gradients == trained * 4 // 4
    assert found.weights < (plan.shape.num_parameters() * 2 + trained * 4) / 4 * 1.2


@pytest.mark.slow
def test_a_rank_of_a_planned_run_is_stepped_here(toy_llama):
    assert "took one step" in str(check_rank(plan_of(toy_llama, "--use-torch-fsdp2 --bf16"), 3))
