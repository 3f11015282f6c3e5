"""Transformer Engine's TransformerLayer over our operators, against torch's functions."""

import pytest
import torch
import torch.nn.functional as F

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.stand_ins import transformer_engine as te

HIDDEN, INNER, HEADS, GROUPS, HEAD_DIM = 12, 10, 4, 2, 5
WIDE = torch.float64
QKV = "self_attention.layernorm_qkv."


@pytest.fixture(autouse=True)
def _seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def layer(**options):
    options = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "params_dtype": WIDE} | options
    made = te.pytorch.TransformerLayer(HIDDEN, INNER, HEADS, GROUPS, kv_channels=HEAD_DIM, **options)
    with torch.no_grad():
        for parameter in made.parameters():  # biases and norms differ from what they begin with
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return made


def formula(state, x, causal=True, key_of_head=lambda head: head // (HEADS // GROUPS)):
    """The layer of separate matrices, LayerNorm and gelu, of x [s, b, h], from its state."""
    normed = F.layer_norm(x, (HIDDEN,), state[QKV + "layer_norm_weight"], state[QKV + "layer_norm_bias"])
    q, k, v = (
        F.linear(normed, state[f"{QKV}{name}_weight"], state[f"{QKV}{name}_bias"]).unflatten(-1, (-1, HEAD_DIM))
        for name in ("query", "key", "value")
    )
    heads = []
    for head in range(HEADS):
        scores = torch.einsum("sbd,tbd->bst", q[:, :, head], k[:, :, key_of_head(head)]) * HEAD_DIM**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        heads.append(torch.einsum("bst,tbd->sbd", scores.softmax(-1), v[:, :, key_of_head(head)]))
    x = x + F.linear(torch.cat(heads, -1), state["self_attention.proj.weight"], state["self_attention.proj.bias"])
    mlp = {name.removeprefix("layernorm_mlp."): value for name, value in state.items() if "mlp" in name}
    normed = F.layer_norm(x, (HIDDEN,), mlp["layer_norm_weight"], mlp["layer_norm_bias"])
    inner = F.gelu(F.linear(normed, mlp["fc1_weight"], mlp["fc1_bias"]), approximate="tanh")
    return x + F.linear(inner, mlp["fc2_weight"], mlp["fc2_bias"])


def parameters(made):
    return dict(made.named_parameters())


@pytest.mark.parametrize("causal", [True, False])
def test_it_computes_the_formula_and_its_gradients(causal):
    made = layer(self_attn_mask_type="causal" if causal else "no_mask")
    state = {name: value.detach().clone().requires_grad_() for name, value in parameters(made).items()}
    x = torch.randn(6, 2, HIDDEN, dtype=WIDE)
    expected, found = formula(state, x, causal), made(x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, parameter in parameters(made).items():
        torch.testing.assert_close(parameter.grad, state[name].grad, msg=name)


def test_the_comparison_notices_another_pairing_of_heads():
    made = layer()
    x = torch.randn(6, 2, HIDDEN, dtype=WIDE)
    assert (formula(parameters(made), x, key_of_head=lambda head: head % GROUPS) - made(x)).abs().max() > 1e-3


@pytest.mark.parametrize("interleaved", [True, False])
def test_one_matrix_holds_what_three_do(interleaved):
    apart, fused = layer(), layer(fuse_qkv_params=True, qkv_weight_interleaved=interleaved)
    state = apart.state_dict()
    for kind in ("weight", "bias"):
        q, k, v = (state.pop(f"{QKV}{name}_{kind}") for name in ("query", "key", "value"))
        if interleaved:
            of_group = [x.unflatten(0, (GROUPS, -1, HEAD_DIM)) for x in (q, k, v)]
            state[QKV + kind] = torch.cat(of_group, 1).flatten(0, 2)
        else:
            state[QKV + kind] = torch.cat([q, k, v])
    fused.load_state_dict(state)
    x = torch.randn(6, 2, HIDDEN, dtype=WIDE)
    torch.testing.assert_close(fused(x), apart(x))


def test_batch_first_rmsnorm_and_a_gate():
    made = layer(normalization="RMSNorm", activation="swiglu", bias=False)
    turned = layer(normalization="RMSNorm", activation="swiglu", bias=False, attn_input_format="bshd")
    turned.load_state_dict(made.state_dict())
    assert not any("bias" in name for name in parameters(made))
    x = torch.randn(6, 2, HIDDEN, dtype=WIDE)
    torch.testing.assert_close(turned(x.transpose(0, 1)), made(x).transpose(0, 1))


def test_dropout_is_of_training_alone():
    made = layer(hidden_dropout=0.5)
    x = torch.randn(6, 2, HIDDEN, dtype=WIDE)
    assert not torch.equal(made(x), made(x))
    torch.testing.assert_close(made.eval()(x), formula(parameters(made), x))


def test_a_layer_of_the_meta_device_is_drawn_module_by_module():
    made = te.pytorch.TransformerLayer(HIDDEN, INNER, HEADS, device="meta")
    for module in made.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not any(parameter.is_meta for parameter in made.parameters())
    assert made(torch.randn(3, 1, HIDDEN)).isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"tp_size": 2},
        {"layer_type": "decoder"},
        {"ub_tp_comm_overlap": True},
        {"activation": "srelu"},
        {"attn_input_format": "thd"},
        {"fuse_wgrad_accumulation": True},
    ],
)
def test_what_is_not_computed_is_refused(options):
    with pytest.raises(UserError, match="transformer_engine"):
        te.pytorch.TransformerLayer(HIDDEN, INNER, HEADS, **options)


def test_options_of_a_call_are_refused():
    with pytest.raises(UserError, match="rotary_pos_emb"):
        layer()(torch.randn(3, 1, HIDDEN, dtype=WIDE), rotary_pos_emb=torch.zeros(1))
