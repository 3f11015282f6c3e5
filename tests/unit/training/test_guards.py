"""Parts of the guards, each alone."""

import pytest
import torch

from mindspeed_llm.config.guards import policy_of
from mindspeed_llm.config.parser import parse
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.guarding import guarding_problems
from mindspeed_llm.training.guards.batch_state import BatchState, router_buffers
from mindspeed_llm.training.guards.bits import ROW, hash_bits
from mindspeed_llm.training.guards.first_module import nonfinite_weights, watching
from mindspeed_llm.training.guards.skipping import is_left_out, leave_out, read_skips, write_skip
from mindspeed_llm.training.guards.spikes import deviations_above, remember, spike_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int8])
@pytest.mark.parametrize("size", [1, ROW - 1, 3 * ROW + 7])
def test_any_single_bit_changes_the_hash(dtype, size):
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(1)).mul(50).to(dtype)
    before = hash_bits(tensor)
    assert hash_bits(tensor.clone()) == before
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    for place in {0, size // 2, size - 1}:
        for bit in (0, tensor.element_size() * 8 - 2):
            flipped = tensor.clone()
            flipped.view(words)[place] ^= 1 << bit
            assert hash_bits(flipped) != before, (place, bit)


def test_equal_values_with_other_bits_have_another_hash():
    assert hash_bits(torch.tensor([0.0])) != hash_bits(torch.tensor([-0.0]))
    assert hash_bits(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t()) == hash_bits(torch.tensor([1.0, 3.0, 2.0, 4.0]))


def test_a_spike_stands_out_of_a_window_that_is_half_spikes():
    calm = [2.0, 2.1, 1.9, 2.05, 1.95]
    assert deviations_above(2.2, calm) < 3
    assert deviations_above(9.0, calm) > 20
    assert deviations_above(9.0, [*calm, 9.0, 9.0]) > 20
    # The mean and standard deviation of that window would let it pass.
    window = torch.tensor([*calm, 9.0, 9.0])
    assert (9.0 - window.mean()) / window.std() < 2


def test_values_that_do_not_move_do_not_make_small_ones_spikes():
    assert deviations_above(1.001, [1.0] * 8) < 1
    assert deviations_above(-5.0, [1.0] * 8) < 0


def test_a_window_forgets_and_judges_nothing_before_it_is_half_full():
    window = []
    for value in (1.0, 1.0, 1.0, 1.0, 1.0):
        remember(window, value, 4)
    assert window == [1.0] * 4
    assert spike_in("loss", 99.0, [1.0], 3.0, 4) is None
    assert spike_in("loss", 99.0, [1.0, 1.0], 3.0, 4).startswith("loss 99 is 9800.0 deviations above the median 1")


def test_skips_are_recorded_for_the_same_order_of_samples_alone(tmp_path):
    order = {"data": "abc", "seed": 1}
    assert read_skips(tmp_path, order) == []
    write_skip(tmp_path, order, 3, 8, 12, "nan")
    with (tmp_path / "skipped.jsonl").open("a") as file:
        file.write('{"iteration": 4, "fir')  # a crash in the middle of a line
    assert read_skips(tmp_path, order) == [[8, 12]]
    assert read_skips(tmp_path, order | {"seed": 2}) == []


@pytest.mark.parametrize(
    "consumed, size, left_out", [(4, 4, False), (8, 4, True), (12, 4, False), (6, 4, True), (10, 8, True)]
)
def test_a_batch_that_touches_a_range_is_left_out(consumed, size, left_out):
    ranges = []
    leave_out(ranges, 8, 12)
    leave_out(ranges, 8, 12)
    assert ranges == [[8, 12]]
    assert is_left_out(ranges, consumed, size) == left_out


def test_policies():
    assert policy_of("stop") == ("stop", 0) and policy_of("skip:12") == ("skip", 12)
    assert policy_of("rewind") == ("rewind", 3) and policy_of("rewind:1") == ("rewind", 1)
    for wrong in ("skip", "skip:0", "skip:-1", "go on", "stop:1"):
        assert policy_of(wrong) is None
        assert "legal: stop, skip:N" in parse("pretrain", ["--on-nonfinite", wrong]).problems[0]


@pytest.mark.parametrize(
    "words, problem",
    [
        ("--spike-action skip", "--spike-action: no meaning without a threshold"),
        ("--loss-spike-threshold 9 --spike-count 2", "--spike-count: no meaning with --spike-action warn"),
        ("--on-nonfinite rewind", "--on-nonfinite rewind: there is nothing to go back to without --save"),
        ("--on-nonfinite rewind --save x --no-save-optim", "--on-nonfinite rewind does not go with --no-save-optim"),
        ("--loss-spike-threshold 9 --spike-action rewind --spike-count 2 --save x", ""),
        ("--on-nonfinite skip:2", ""),
    ],
)
def test_options_without_meaning_are_refused(words, problem):
    found = guarding_problems(parse("pretrain", words.split()).config)
    assert len(found) == bool(problem) and all(line.startswith(problem) for line in found)


class _Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.second(self.first(x).clamp(min=0).log())


def test_the_first_module_is_the_one_where_it_began():
    net = _Net()
    with torch.no_grad():
        net.first.weight.zero_()
        net.first.bias.fill_(-1.0)
    with watching([net], lambda chunk, name: f"{chunk}.{name}", gradients=False) as first:
        net(torch.ones(1, 2))
        found = first()
        assert found.module == "0.second" and found.what == "output" and found.bad == 2
        net.first.bias.data.fill_(float("nan"))
        net(torch.ones(1, 2))
        assert first().module == "0.first"
        assert nonfinite_weights([net], lambda chunk, name: name) == ["first.bias"]
        net.first.bias.data.fill_(1.0)
        net(torch.ones(1, 2))
        assert first() is None
    assert not net.first._forward_hooks


def test_the_first_gradient_is_the_one_where_it_began():
    net = _Net()
    with torch.no_grad():
        net.first.weight.zero_()
        net.first.bias.fill_(0.0)  # the logarithm of 0 has an infinite slope
        net.second.weight.fill_(1.0)
    with watching([net], lambda chunk, name: name, gradients=True) as first:
        out = net(torch.ones(1, 2))
        torch.where(torch.isfinite(out), out, 0.0).sum().backward()
    assert first().module == "second" and net.first.bias.grad is not None


def test_a_batch_is_taken_back_to_its_random_state():
    router = torch.nn.Module()
    router.register_buffer("local_tokens_per_expert", torch.zeros(2))
    router.register_buffer("expert_bias", torch.ones(2))
    chunk = torch.nn.Sequential(torch.nn.Linear(1, 1), router)
    assert len(router_buffers([chunk])) == 2
    state = BatchState.capture(router_buffers([chunk]))
    drawn = torch.rand(3)
    router.expert_bias += 1
    for _ in range(2):
        state.restore()
        assert torch.equal(torch.rand(3), drawn) and torch.equal(router.expert_bias, torch.ones(2))
        router.expert_bias += 1


def test_a_gradient_of_zero_names_what_was_to_be_trained(door, toy_llama, instructions, monkeypatch):
    from mindspeed_llm.training.guards import guards

    monkeypatch.setattr(guards, "gradient_norm", lambda optimizer: 0.0)
    flags = "--stage sft --prompt-type chatml --seq-length 64 --split 100,0,0 --train-iters 1 --lora-r 2"
    with pytest.raises(UserError, match=r"norm is exactly 0 at iteration 1, because .*lora_A.* and \d+ more"):
        door("posttrain", flags, f"--load {toy_llama} --data-path {instructions}")


def test_fp16_overflows_shrink_the_scale_until_it_cannot(door, toy_llama, instructions, monkeypatch, capsys):
    from mindspeed_llm.training.guards import guards

    def overflowing(optimizer):
        optimizer.prepare_grads()
        optimizer.chained_optimizers[0].grad_scaler.update(True)

    monkeypatch.setattr(guards, "gradient_norm", overflowing)
    flags = "--stage sft --prompt-type chatml --seq-length 64 --split 100,0,0 --train-iters 9 --fp16 --hysteresis 1"
    with pytest.raises(UserError, match="overflow at loss scale 1, the smallest, at iteration 4"):
        door("posttrain", flags, f"--initial-loss-scale 8 --load {toy_llama} --data-path {instructions}")
    assert "number of skipped iterations:   3 | number of nan iterations:   0" in capsys.readouterr().out
