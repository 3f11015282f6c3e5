"""Options of the optimizer's state: what a plan refuses, estimates and shows."""

import pytest

from mindspeed_llm.config.memory import STEP_VALUES
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.optimizer_memory import OptimizerForm
from mindspeed_llm.plan.show import plan_memory, show_plan


@pytest.mark.parametrize("words, said", [
    ("--swap-optimizer-times 4", "--swap-optimizer-times has no meaning without --swap-optimizer"),
    ("--swap-optimizer --swap-optimizer-times 0", "--swap-optimizer-times"),
    ("--reuse-fp32-param", "--reuse-fp32-param needs --bf16"),
    ("--reuse-fp32-param --fp16", "--reuse-fp32-param needs --bf16"),
    ("--use-torch-fsdp2 --bf16 --o2-optimizer", "--o2-optimizer does not go with --use-torch-fsdp2"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(plan, words, said):
    with pytest.raises(UserError) as refused:
        plan(words)
    assert len([line for line in str(refused.value).splitlines() if said in line]) == 1


@pytest.mark.parametrize("words, bytes_each", [
    ("--bf16", 12), ("--bf16 --o2-optimizer", 8), ("--bf16 --reuse-fp32-param", 10.125),
    ("--bf16 --reuse-fp32-param --o2-optimizer", 6.125), ("--bf16 --swap-optimizer", 0),
    ("", 8), ("--o2-optimizer", 4), ("--swap-optimizer", 0),
])  # fmt: skip
def test_the_estimate_counts_each(plan, words, bytes_each):
    made = plan(words)
    parameters = made.shape.num_parameters()
    found = plan_memory(made)
    assert abs(found.optimizer / parameters - bytes_each) < 0.1 * max(bytes_each, 1)
    on_host = 0 if "swap" not in words else 12 if "bf16" in words else 8
    assert abs(found.optimizer_on_host / parameters - on_host) < 0.1 * max(on_host, 1)


def test_a_step_needs_memory_of_its_own():
    many = 10**9
    assert OptimizerForm().in_step(many, 2) == 0
    assert OptimizerForm(windows=16).in_step(many, 2) == 2 * 12 * many // 16
    assert OptimizerForm(windows=1).in_step(many, 2) == 12 * many  # there is no second one
    assert OptimizerForm(windows=16, split=True).resident(many, 2) == 0
    assert OptimizerForm(moment_bytes=2).in_step(many, 2) == 8 * STEP_VALUES
    assert OptimizerForm(moment_bytes=2).in_step(1000, 2) == 8 * 1000


def test_windows_larger_than_activations_count(plan):
    """The step's memory counts where it is more than what forward and backward passes need at once."""
    short = "--seq-length 16 --swap-optimizer"
    few, many = plan_memory(plan(f"{short} --swap-optimizer-times 1")), plan_memory(plan(short))
    assert few.total > many.total and few.optimizer == many.optimizer == 0


def test_the_dry_run_says_where_the_state_is(plan, capsys):
    made = plan("--bf16 --swap-optimizer --swap-optimizer-times 4")
    show_plan(made)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"optimizer on the host {plan_memory(made).optimizer_on_host / 2**20:.1f} MiB, stepped in 4 windows" in shown
