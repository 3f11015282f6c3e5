"""Fused attention: scores of all pairs in fp32, under the masks that `sparse_mode` names.

B batch, S sequence, N query heads, G key heads, D head size, T tokens of all sequences of a TND call.
Everything is computed on [B, N, S, D]; a TND call is one such tensor for each sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simulator.kernels.registry import kernel, require

HUGE = 2147483647
LAYOUTS = {"BSH": "bsnd", "BSND": "bsnd", "SBH": "sbnd", "BNSD": "bnsd", "TND": "snd"}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# A causal mask is handed over as the corner of a larger one, for all lengths; of mode 6 with a prefix part below.
COMPRESSED = {2: (2048, 2048), 3: (2048, 2048), 4: (2048, 2048), 6: (3072, 2048), 7: (2048, 2048), 8: (2048, 2048)}
STATISTIC_COPIES = 8  # maximum and sum are stored eight times over


@dataclass(frozen=True)
class Settings:
    """What forward and backward pass must agree in."""

    layout: str
    heads: int
    scale: float
    mask: Tensor | None
    mode: int
    before: int  # pre_tockens
    after: int  # next_tockens
    prefix: Sequence[int] | None
    query_ends: Sequence[int] | None
    key_ends: Sequence[int] | None
    keep: float
    statistics_layout: str
    seed: int = 0
    offset: int = 0
    head_size: int = 0  # of layouts that do not show it


@dataclass(frozen=True)
class Sequences:
    """Queries, keys and values [B, heads, S, D] of one sequence (of all, but in a TND call) and their number."""

    index: int
    last: int
    query: Tensor
    key: Tensor
    value: Tensor

    def key_of_query_heads(self) -> tuple[Tensor, Tensor]:
        repeats = self.query.shape[1] // self.key.shape[1]
        return tuple(x.float().repeat_interleave(repeats, 1) for x in (self.key, self.value))


def check(query: Tensor, key: Tensor, value: Tensor, s: Settings) -> None:
    """Limits of aclnnFlashAttentionScore's documentation."""
    rule = "npu_fusion_attention"
    require(s.layout in LAYOUTS, rule, f"input_layout {s.layout} is not one of {', '.join(LAYOUTS)}")
    require(query.dtype in DTYPES, rule, f"{query.dtype} is not float16, bfloat16 or float32")
    require(query.dtype == key.dtype == value.dtype, rule, "query, key and value differ in type")
    require(1 <= s.heads <= 256, rule, f"head_num {s.heads} is outside 1..256")
    if s.layout == "TND":
        require(s.query_ends is not None and s.key_ends is not None, rule, "TND needs actual_seq_qlen and _kvlen")
    first = next(sequences(query, key, value, s))
    q, k, v = first.query, first.key, first.value
    require(q.shape[1] == s.heads, rule, f"head_num {s.heads} is not the {q.shape[1]} heads of query")
    require(q.shape[1] % k.shape[1] == 0, rule, "the heads of query are not a multiple of those of key")
    require(q.shape[3] == k.shape[3] <= 768, rule, "head sizes of query and key differ or exceed 768")
    require(v.shape[3] <= k.shape[3], rule, "the head size of value exceeds that of key")
    require(0 <= s.mode <= 8, rule, f"sparse_mode {s.mode} is outside 0..8")
    if s.layout == "TND":
        require(s.query_ends[0] != 0 or len(s.query_ends) == 1, rule, "actual_seq_qlen starts with 0")
        require(len(s.query_ends) <= 2048, rule, "more than 2048 sequences")
    if s.mask is not None:
        require(s.mask.dtype in (torch.bool, torch.uint8), rule, f"atten_mask is {s.mask.dtype}, not bool or uint8")
        if s.mode in COMPRESSED:
            expected = COMPRESSED[s.mode]
            found = tuple(s.mask.shape[-2:])
            require(found == expected, rule, f"sparse_mode {s.mode} takes a mask of {expected}, not {found}")


def split(x: Tensor, s: Settings, ends: Sequence[int] | None) -> list[Tensor]:
    """Tensors [B, heads, S, D] of each sequence."""
    if s.layout in ("BSH", "SBH"):
        x = x.unflatten(-1, (-1, s.head_size))
    if s.layout != "TND":
        return [x.permute(*[LAYOUTS[s.layout].index(axis) for axis in "bnsd"])]
    starts = [0, *ends[:-1]]
    return [x[start:stop].transpose(0, 1)[None] for start, stop in zip(starts, ends) if stop >= start]


def merge(parts: list[Tensor], s: Settings, like: Tensor) -> Tensor:
    """Inverse of `split`; tokens of no sequence get zeros."""
    if s.layout != "TND":
        whole = parts[0].permute(*["bnsd".index(axis) for axis in LAYOUTS[s.layout]])
        return (whole.flatten(-2) if s.layout in ("BSH", "SBH") else whole).contiguous()
    whole = torch.cat([part[0].transpose(0, 1) for part in parts])
    rest = like.shape[0] - whole.shape[0]
    return torch.cat((whole, whole.new_zeros(rest, *whole.shape[1:]))) if rest else whole


def sequences(query: Tensor, key: Tensor, value: Tensor, s: Settings) -> Iterator[Sequences]:
    # In BSH and SBH the values' head size shows in the number of key heads only.
    key_heads = key.shape[-1] // s.head_size if s.head_size else 0
    of_value = replace(s, head_size=value.shape[-1] // key_heads) if key_heads else s
    parts = list(zip(split(query, s, s.query_ends), split(key, s, s.key_ends), split(value, of_value, s.key_ends)))
    for index, (q, k, v) in enumerate(parts):
        yield Sequences(index, len(parts) - 1, q, k, v)


def hidden(part: Sequences, s: Settings) -> Tensor | None:
    """True where a query does not see a key, to be broadcast to [B, N, S, S_k]; None where all see all."""
    if s.mask is None:
        return None
    num_queries, num_keys = part.query.shape[2], part.key.shape[2]
    i, j = torch.arange(num_queries)[:, None], torch.arange(num_keys)[None, :]
    shift = num_keys - num_queries
    upper_left, lower_right = j > i, j > i + shift
    band = (j - i - shift > s.after) | (i + shift - j > s.before)
    if s.mode in (0, 1):
        return s.mask.bool()[..., :num_queries, :num_keys]
    if s.mode in (5, 6):
        prefix = torch.tensor(s.prefix).view(-1, 1, 1, 1)
        return lower_right & (j >= (prefix[part.index : part.index + 1] if s.layout == "TND" else prefix))
    if s.mode == 7:
        return band if part.index == part.last else lower_right
    if s.mode == 8:
        return band if part.index == 0 else upper_left
    return {2: upper_left, 3: lower_right, 4: band}[s.mode]


def scores_of(part: Sequences, s: Settings) -> Tensor:
    key, _ = part.key_of_query_heads()
    scores = part.query.float() @ key.transpose(-1, -2) * s.scale
    unseen = hidden(part, s)
    return scores if unseen is None else scores.masked_fill(unseen, float("-inf"))


def kept(weights: Tensor, part: Sequences, s: Settings) -> Tensor:
    """1 / keep where a weight is kept by dropout and 0 where not: the same in the backward pass, by seed and offset."""
    if s.keep >= 1.0:
        return torch.ones(())
    generator = torch.Generator().manual_seed(hash((s.seed, s.offset, part.index)) & 0x7FFFFFFFFFFFFFFF)
    return torch.empty_like(weights).bernoulli_(s.keep, generator=generator) / s.keep


def pack_statistics(parts: list[Tensor], s: Settings) -> Tensor:
    """[B, N, S] of each sequence as [B, N, S, 8]. TND: [T, N, 8] in name, in memory [N, S, 8] sequence by sequence."""
    parts = [part.unsqueeze(-1).expand(*part.shape, STATISTIC_COPIES) for part in parts]
    if s.layout != "TND":
        return parts[0].contiguous()
    if s.statistics_layout == "TND":
        return torch.cat([part[0].transpose(0, 1) for part in parts]).contiguous()
    heads = parts[0].shape[1]
    return torch.cat([part[0].reshape(-1, STATISTIC_COPIES) for part in parts]).view(-1, heads, STATISTIC_COPIES)


def unpack_statistics(packed: Tensor, s: Settings) -> list[Tensor]:
    if s.layout != "TND":
        return [packed[..., 0]]
    heads, parts, start = packed.shape[1], [], 0
    for stop in s.query_ends:
        if stop < start:
            break
        if s.statistics_layout == "TND":
            parts.append(packed[start:stop, :, 0].transpose(0, 1)[None])
        else:
            rows = packed.reshape(-1, STATISTIC_COPIES)[start * heads : stop * heads, 0]
            parts.append(rows.view(1, heads, stop - start))
        start = stop
    return parts


def _settings(query: Tensor, **given: object) -> Settings:
    s = Settings(**given)
    return replace(s, head_size=query.shape[-1] // s.heads) if s.layout in ("BSH", "SBH") else s


def _take_seed(keep: float) -> tuple[int, int]:
    """Seed and offset of the device's generator, which moves on if weights are dropped."""
    generator = torch.npu.default_generators[torch.npu.current_device()]
    seed, offset = generator.get_state().view(torch.int64).tolist()
    if keep < 1.0:
        generator.set_state(torch.tensor([seed, offset + 4]).view(torch.uint8))
    return seed, offset


@kernel("npu_fusion_attention")
def npu_fusion_attention(
    query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, keep_prob=1.0,
    pre_tockens=HUGE, next_tockens=HUGE, inner_precise=0, prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None,
    sparse_mode=0, gen_mask_parallel=True, sync=False, softmax_layout="", sink=None, dropout_mask=None, seed=0,
    offset=0,
):  # fmt: skip
    """-> out, maximum, sum, [0], seed, offset, numels."""
    require(pse is None and sink is None, "fused attention", "pse and sink are not simulated")
    seed, offset = _take_seed(keep_prob)
    s = _settings(
        query, layout=input_layout.upper(), heads=head_num, scale=scale, mask=atten_mask, mode=sparse_mode,
        before=pre_tockens, after=next_tockens, prefix=prefix, query_ends=actual_seq_qlen, key_ends=actual_seq_kvlen,
        keep=keep_prob, statistics_layout=softmax_layout, seed=seed, offset=offset,
    )  # fmt: skip
    check(query, key, value, s)
    outs, maxima, sums = [], [], []
    for part in sequences(query, key, value, s):
        scores = scores_of(part, s)
        maximum = scores.amax(-1) if scores.shape[-1] else scores.new_zeros(scores.shape[:-1])
        maximum = maximum.masked_fill(maximum.isinf(), 0.0)
        weights = (scores - maximum.unsqueeze(-1)).exp()
        total = weights.sum(-1)
        weights = weights / total.clamp_min(1e-30).unsqueeze(-1)
        weights = weights * kept(weights, part, s)
        outs.append((weights @ part.key_of_query_heads()[1]).to(query.dtype))
        maxima.append(maximum)
        sums.append(total)
    out = merge(outs, s, query)
    return out, pack_statistics(maxima, s), pack_statistics(sums, s), query.new_empty(0), seed, offset, out.numel()


@kernel("npu_fusion_attention_grad")
def npu_fusion_attention_grad(
    query, key, value, dy, head_num, input_layout, *, pse=None, padding_mask=None, atten_mask=None, softmax_max=None,
    softmax_sum=None, softmax_in=None, attention_in=None, scale_value=1.0, keep_prob=1.0, pre_tockens=HUGE,
    next_tockens=HUGE, inner_precise=0, seed=0, offset=0, numels=0, prefix=None, actual_seq_qlen=None,
    actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False, softmax_layout="", sink=None,
):  # fmt: skip
    """-> gradients of query, key, value; [0]; [0]. Maximum, sum and out may be of more keys than are given here."""
    s = _settings(
        query, layout=input_layout.upper(), heads=head_num, scale=scale_value, mask=atten_mask, mode=sparse_mode,
        before=pre_tockens, after=next_tockens, prefix=prefix, query_ends=actual_seq_qlen, key_ends=actual_seq_kvlen,
        keep=keep_prob, statistics_layout=softmax_layout, seed=seed, offset=offset,
    )  # fmt: skip
    check(query, key, value, s)
    of_value = replace(s, head_size=attention_in.shape[-1] // head_num)
    grads, outs = (split(x, of_value, s.query_ends) for x in (dy, attention_in))
    statistics = zip(unpack_statistics(softmax_max, s), unpack_statistics(softmax_sum, s))
    results = [
        _gradients(part, s, grad.float(), out.float(), maximum, total)
        for part, grad, out, (maximum, total) in zip(sequences(query, key, value, s), grads, outs, statistics)
    ]
    whole = (merge(list(parts), s, like).to(query.dtype) for parts, like in zip(zip(*results), (query, key, value)))
    return *whole, query.new_empty(0), query.new_empty(0)


def _gradients(part: Sequences, s: Settings, grad: Tensor, out: Tensor, maximum: Tensor, total: Tensor) -> list[Tensor]:
    """P = exp(S - max) / sum; with dropout's factors R: dV = (P R)^T dO, dS = P (R (dO V^T) - sum(dO O)) scale."""
    key, value = part.key_of_query_heads()
    weights = (scores_of(part, s) - maximum.unsqueeze(-1)).exp() / total.clamp_min(1e-30).unsqueeze(-1)
    factors = kept(weights, part, s)
    inner = (grad * out).sum(-1, keepdim=True)
    grad_scores = weights * (factors * (grad @ value.transpose(-1, -2)) - inner) * s.scale
    groups = part.key.shape[1]
    grad_key = (grad_scores.transpose(-1, -2) @ part.query.float()).unflatten(1, (groups, -1)).sum(2)
    grad_value = ((weights * factors).transpose(-1, -2) @ grad).unflatten(1, (groups, -1)).sum(2)
    return [grad_scores @ key, grad_key, grad_value]


@kernel("npu_fusion_attention_v3")
def npu_fusion_attention_v3(query, key, value, head_num, input_layout, *args, **kwargs):
    """As the first, seed and offset being tensors: what torch's scaled_dot_product_attention calls."""
    *results, seed, offset, _ = npu_fusion_attention(query, key, value, head_num, input_layout, *args, **kwargs)
    return *results, torch.tensor([seed]), torch.tensor([offset])


@kernel("npu_fusion_attention_grad_v3")
def npu_fusion_attention_grad_v3(query, key, value, dy, head_num, input_layout, *, seed=None, offset=None, **kwargs):
    """As the first."""
    numbers = {name: 0 if x is None else int(x) for name, x in (("seed", seed), ("offset", offset))}
    return npu_fusion_attention_grad(query, key, value, dy, head_num, input_layout, **numbers, **kwargs)


@kernel("npu_ring_attention_update")
def npu_ring_attention_update(
    prev_attn_out, prev_softmax_max, prev_softmax_sum, cur_attn_out, cur_softmax_max, cur_softmax_sum, *,
    actual_seq_qlen=None, input_layout="SBH", input_softmax_layout="",
):  # fmt: skip
    """Merge the results of attention to two sets of keys -> out, maximum, sum. actual_seq_qlen starts with 0 here."""
    rule = "npu_ring_attention_update"
    require(prev_softmax_max.shape[-1] == STATISTIC_COPIES, rule, "statistics must end in a dimension of 8")
    require(prev_softmax_max.dtype == torch.float32, rule, "statistics must be float32")
    require(input_layout in ("SBH", "TND"), rule, f"input_layout {input_layout} is not SBH or TND")
    require(prev_attn_out.dim() == 3, rule, "out must have three dimensions")
    maximum = torch.maximum(prev_softmax_max, cur_softmax_max)
    before, now = (
        total * (own - maximum).exp()
        for total, own in ((prev_softmax_sum, prev_softmax_max), (cur_softmax_sum, cur_softmax_max))
    )
    total = before + now
    if input_layout == "SBH":
        size = prev_attn_out.shape[-1] // total.shape[1]
        shares = [(x / total)[..., 0].permute(2, 0, 1).repeat_interleave(size, -1) for x in (before, now)]
    else:
        ends = actual_seq_qlen.tolist()[1:]
        s = replace(_EMPTY, query_ends=ends, statistics_layout=input_softmax_layout)
        shares = [
            torch.cat([part[0].transpose(0, 1) for part in unpack_statistics((x / total).contiguous(), s)])[..., None]
            for x in (before, now)
        ]
    out = prev_attn_out.float() * shares[0] + cur_attn_out.float() * shares[1]
    return out.to(prev_attn_out.dtype), maximum, total


_EMPTY = Settings("TND", 1, 1.0, None, 0, HUGE, HUGE, None, None, None, 1.0, "")
