"""What flash-attn and torch's kernel for documents are handed on a GPU, seen by stand-ins that compute the formula."""

import sys
import types

import pytest
import torch

from mindspeed_llm.ops import registry
from mindspeed_llm.ops.attention import reference
from mindspeed_llm.ops.cuda import attention as cuda

torch.set_num_threads(1)


@pytest.fixture
def kernels(monkeypatch):
    """flash_attn and varlen_attn, with their signatures; what they were asked for is remembered."""
    asked = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
        asked.append(("flash_attn_func", dropout_p, softmax_scale, causal, window_size, softcap))
        window = None if window_size[0] < 0 else window_size[0] + 1
        out = reference(
            *(x.transpose(0, 1) for x in (q, k, v)), window_size=window, scale=softmax_scale, softcap=softcap or None
        )
        return out.transpose(0, 1).unflatten(2, (q.shape[2], -1))

    def documents(name, q, k, v, ends, longest, scale, window_size, *more):
        asked.append((name, ends.dtype, longest, scale, window_size, *more))
        window = None if window_size[0] < 0 else window_size[0] + 1
        rows = (x.unsqueeze(1) for x in (q, k, v))
        return reference(*rows, cu_seqlens=ends, window_size=window, scale=scale)[:, 0].unflatten(1, (q.shape[1], -1))

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1),
    ):  # fmt: skip
        assert cu_seqlens_k is cu_seqlens_q and max_seqlen_k == max_seqlen_q
        more = (dropout_p, causal)
        return documents("flash", q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, window_size, *more)

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert cu_seq_k is cu_seq_q and max_k == max_q
        return documents("varlen", query, key, value, cu_seq_q, max_q, scale, window_size, enable_gqa)

    package = types.ModuleType("flash_attn")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(cuda, "TYPES", (torch.float64,))
    monkeypatch.setattr(cuda, "fits", lambda q, k, v: q.dtype in cuda.TYPES and q.shape[-1] == v.shape[-1])
    return asked


def tensors(s=6, s_k=6, b=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(t, b, n, 8, generator=generator, dtype=torch.float64) for t, n in ((s, 4), (s_k, 2), (s_k, 2))]


@pytest.mark.parametrize("s, window, softcap", [(2, None, None), (6, 3, None), (6, None, 1.5), (2, 3, 1.5)])
def test_windows_caches_and_caps_go_to_flash_attn(kernels, s, window, softcap):
    q, k, v = tensors(s)
    found = cuda.flash_attention(q, k, v, window, 0.0, 0.3, softcap)
    torch.testing.assert_close(found, reference(q, k, v, window_size=window, scale=0.3, softcap=softcap))
    seen = (-1, 0) if window is None else (window - 1, 0)
    assert kernels == [("flash_attn_func", 0.0, 0.3, True, seen, softcap or 0.0)]


def test_plain_causal_attention_and_what_does_not_fit_go_elsewhere(kernels):
    q, k, v = tensors()
    torch.testing.assert_close(cuda.flash_attention(q, k, v, None, 0.0, None), reference(q, k, v))
    narrow = [x.float() for x in (q, k, v)]
    capped = cuda.flash_attention(*narrow, 3, 0.0, None, 1.5)
    torch.testing.assert_close(capped, reference(*narrow, window_size=3, softcap=1.5))
    assert kernels == []


@pytest.mark.parametrize(
    "function, name", [(cuda.flash_packed_attention, "flash"), (cuda.torch_packed_attention, "varlen")]
)
@pytest.mark.parametrize("window", [None, 2])
def test_documents_go_in_one_call(kernels, function, name, window):
    q, k, v = tensors(b=1)
    found = function(q, k, v, [4, 2], window, 0.0, None)
    expected = reference(q, k, v, cu_seqlens=torch.tensor([0, 4, 6]), window_size=window)
    torch.testing.assert_close(found, expected)
    more = (0.0, True) if name == "flash" else (True,)
    assert kernels == [(name, torch.int32, 4, None, (-1, 0) if window is None else (1, 0), *more)]


def test_torchs_kernel_has_no_dropout(kernels):
    q, k, v = tensors(b=1)
    torch.manual_seed(0)
    cuda.torch_packed_attention(q, k, v, [4, 2], None, 0.5, None)
    assert kernels == []


def test_limits_of_the_kernels():
    q = torch.zeros(2, 1, 2, 8, dtype=torch.bfloat16)
    assert not cuda.fits(q, q, q)  # not on a GPU


def test_a_torch_whose_kernel_takes_less_is_not_called(monkeypatch):
    (entry,) = (e for e in registry.implementations("packed_attention") if e.name == "varlen_attn")
    assert entry.missing("cuda") is None

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        raise AssertionError

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    assert entry.missing("cuda").endswith("has no scale, window_size, enable_gqa")


@pytest.mark.parametrize("generation, has_kernels", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_older_gpus_take_torchs_own_attention(monkeypatch, generation, has_kernels):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: generation)
    assert cuda._has_kernels.__wrapped__(0) is has_kernels
