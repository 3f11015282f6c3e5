"""What reaches Liger-Kernel's functions: stand-ins with the signatures of its 0.8, which also write where it writes."""

import sys
import types

import pytest
import torch

from mindspeed_llm.ops import norm
from mindspeed_llm.ops.activation import Gate, torch_gated_activation
from mindspeed_llm.ops.cuda import liger
from mindspeed_llm.ops.registry import REFERENCE, implementations
from mindspeed_llm.testing import operators
from mindspeed_llm.testing.operators import elementwise

torch.set_num_threads(1)


class Calls:
    """Stands for an autograd function of Liger's: its `apply` is `compute`, whose calls are counted."""

    def __init__(self, compute):
        self.compute, self.count = compute, 0

    def apply(self, *arguments):
        self.count += 1
        return self.compute(*arguments)


def scaled(x, weight, eps, offset, casting_mode):
    unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        assert weight.dtype == x.dtype and not offset
        return unit.to(x.dtype) * weight
    assert casting_mode == "gemma"
    return (unit * (weight.float() + offset)).to(x.dtype)


def rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
    assert not in_place and row_mode is None
    return scaled(X, W, eps, offset, casting_mode)


def add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False):
    assert not in_place and X.shape == R.shape
    return scaled(X + R, W, eps, offset, casting_mode), X + R


class SwiGLU(torch.autograd.Function):
    """Its gradient has two dimensions, whatever its input has."""

    @staticmethod
    def forward(ctx, y, in_place=False):
        ctx.save_for_backward(y)
        gate, up = y.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            gate, up = y.chunk(2, dim=-1)
            (found,) = torch.autograd.grad(torch.nn.functional.silu(gate) * up, y, grad)
        return found.view(-1, y.shape[-1]), None


class GeGLU(torch.autograd.Function):
    """Writes the gradients over what it saved."""

    @staticmethod
    def forward(ctx, a, b):
        assert a.is_contiguous() and b.is_contiguous()
        ctx.save_for_backward(a, b)
        return torch.nn.functional.gelu(a, approximate="tanh") * b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        with torch.enable_grad():
            one, other = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
            found = torch.autograd.grad(torch.nn.functional.gelu(one, approximate="tanh") * other, (one, other), grad)
        a.data.copy_(found[0])
        b.data.copy_(found[1])
        return a, b


def turn(q, k, cos, sin, rotary_dim, sign):
    """Rotate [bsz, heads, seq, d] in place where the storage is [bsz, seq, heads, d] without gaps."""
    assert cos.dim() == 3 and cos.shape[0] == 1 and cos.shape[-1] == rotary_dim // 2
    half = rotary_dim // 2
    turned = []
    for x in (q, k):
        x = x.transpose(1, 2).contiguous()
        assert cos.shape[1] == x.shape[1]
        x1, x2 = x[..., :half].clone(), x[..., half:rotary_dim].clone()
        x.data[..., :half] = x1 * cos[:, :, None] - sign * x2 * sin[:, :, None]
        x.data[..., half:rotary_dim] = x2 * cos[:, :, None] + sign * x1 * sin[:, :, None]
        turned.append(x.transpose(1, 2))
    return turned


class Rope:
    """rope_forward and rope_backward."""

    def __init__(self):
        self.count = 0

    def rope_forward(self, q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        self.count += 1
        return *turn(q, k, cos, sin, rotary_dim, 1), cos, sin

    def rope_backward(self, dq, dk, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        return turn(dq, dk, cos, sin, rotary_dim, -1)


def linear_cross_entropy(
    _input,
    weight,
    target,
    bias=None,
    ce_weight=None,
    ignore_index=-100,
    lse_square_scale=0.0,
    label_smoothing=0.0,
    reduction="mean",
    softcap=None,
    return_z_loss=False,
    accum_dtype=None,
    use_token_scaling=False,
    return_token_accuracy=False,
    return_predicted_tokens=False,
    ce_impl=None,
    ce_mode=None,
    chunk_mem_const=1,
):
    assert bias is None and ce_weight is None and softcap is None and accum_dtype == torch.float32
    assert lse_square_scale == label_smoothing == 0.0 and not return_z_loss and not use_token_scaling
    logits = (_input @ weight.t()).float()
    loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)
    return loss.to(_input.dtype), None, None, None


@pytest.fixture
def package(monkeypatch):
    """A package with Liger's modules; operator -> what counts its calls."""
    counters = {
        "rms_norm": Calls(rms_norm),
        "add_rms_norm": Calls(add_rms_norm),
        "swiglu": Calls(SwiGLU.apply),
        "gated_activation": Calls(GeGLU.apply),
        "split_qkv_rotary": Rope(),
        "linear_cross_entropy_sum": Calls(linear_cross_entropy),
    }
    rope = counters["split_qkv_rotary"]
    modules = {
        "rms_norm": {"LigerRMSNormFunction": counters["rms_norm"]},
        "fused_add_rms_norm": {"LigerFusedAddRMSNormFunction": counters["add_rms_norm"]},
        "swiglu": {"LigerFusedGateUpSiLUMulFunction": counters["swiglu"]},
        "geglu": {"LigerGELUMulFunction": counters["gated_activation"]},
        "rope": {"rope_forward": rope.rope_forward, "rope_backward": rope.rope_backward},
        "fused_linear_cross_entropy": {"LigerFusedLinearCrossEntropyFunction": counters["linear_cross_entropy_sum"]},
    }
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, members in modules.items():
        module = types.ModuleType(f"liger_kernel.ops.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return counters


def by_name(operator, name):
    return next(entry.function for entry in implementations(operator) if entry.name == name)


OPERATORS = [name for name, entries in elementwise.IMPLEMENTATIONS.items() if "liger" in entries]


@pytest.mark.parametrize("operator", OPERATORS)
def test_arguments_and_shapes_are_those_of_liger(operator, package):
    cases = [case for case in elementwise.CASES if case.operator == operator]
    for case in cases:
        found = operators.evaluate(case, by_name(operator, "liger"), torch.float32)
        expected = operators.evaluate(case, by_name(operator, REFERENCE), torch.float32)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert package[operator].count, "no case reached the kernel"


def test_every_operator_of_liger_has_a_stand_in(package):
    assert set(OPERATORS) == set(package)


def test_what_liger_cannot_do_goes_elsewhere(package):
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    assert torch.equal(liger.liger_rms_norm(x, weight, 1e-5), norm.two_pass_rms_norm(x, weight, 1e-5))
    gate = Gate("gelu_tanh", limit=0.5)
    y = torch.randn(3, 8)
    assert torch.equal(liger.liger_gated_activation(y, gate), torch_gated_activation(y, gate))
    assert not package["rms_norm"].count and not package["gated_activation"].count


def test_a_kernel_that_writes_over_its_input_would_be_noticed(package):
    case = next(c for c in elementwise.CASES if c.operator == "split_qkv_rotary")
    qkv, *rest = case.inputs(operators.Draw(0, torch.float32))
    before = qkv.detach().clone()
    liger.liger_split_qkv_rotary(qkv, *rest)
    assert torch.equal(qkv, before)
    grouped = qkv.detach().view(5, 2, 2, 5, 8)[:, :, 0, :1]
    cos, sin = liger._table_rows(rest[-1], 2)
    contiguous = grouped.contiguous()
    package["split_qkv_rotary"].rope_forward(*(liger._rows(contiguous),) * 2, cos, sin, rotary_dim=8)
    assert not torch.equal(contiguous, grouped)
