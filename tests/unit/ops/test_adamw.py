"""AdamW steps as torch's does, bit for bit, with torch's state."""

import copy

import pytest
import torch

from mindspeed_llm.ops import registry
from mindspeed_llm.ops.adamw import FusedAdamW

torch.set_num_threads(1)


def train(optimizer_of, steps=3):
    """Parameters and state after some steps."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((5, 7), (3,), (1,))]
    groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]
    optimizer = optimizer_of(groups)
    for step in range(steps):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.randn_like(parameter) if (step, number) != (1, 2) else None
        optimizer.step()
    state = [optimizer.state[p] for p in parameters]
    return [p.detach() for p in parameters] + [s[k] for s in state for k in ("exp_avg", "exp_avg_sq", "step")]


def ours(groups):
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-6)
    FusedAdamW.take_over(optimizer)
    return optimizer


def theirs(**kind):
    return lambda groups: torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-6, **kind)


@pytest.mark.parametrize(
    "name, kind", [("torch-fused", {"fused": True}), (registry.REFERENCE, {"foreach": False, "fused": False})]
)
def test_every_bit_is_torchs(name, kind):
    registry.select("adamw", name)
    try:
        found = train(ours)
    finally:
        registry.reset()
    expected = train(theirs(**kind))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    other_epsilon = train(lambda groups: torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-5, **kind))
    assert not all(torch.equal(one, other) for one, other in zip(found, other_epsilon))


def test_state_goes_on_where_torch_left_it():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, fused=True)
    parameter.grad = torch.randn(4)
    optimizer.step()
    twin = torch.nn.Parameter(parameter.detach().clone())
    other = torch.optim.AdamW([twin], lr=0.01, fused=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    FusedAdamW.take_over(other)
    twin.grad = parameter.grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(parameter, twin)


def test_what_is_not_computed_is_refused():
    with pytest.raises(ValueError, match="amsgrad"):
        FusedAdamW.take_over(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], amsgrad=True))
