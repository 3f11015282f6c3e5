"""One token for each row: a lean pass over a built model's weights, reading and extending the cache.

It computes what LanguageModel.forward computes (a test compares them), without what a single token does not need.
Linears of one process without adapters are applied directly; all others (tensor parallel, adapted) through their
module. Reading the weights is what costs: at one row each of them is read once for one product.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_llm.inference.cache import Cache
from mindspeed_llm.models.attention import SelfAttention
from mindspeed_llm.models.gpt import LanguageModel
from mindspeed_llm.models.linear import ColumnParallelLinear, RowParallelLinear
from mindspeed_llm.models.mlp import MLP
from mindspeed_llm.models.rope import LENGTH_DEPENDENT, rope_frequencies
from mindspeed_llm.ops.rotary import rotary_table, rotate

Linear = Callable[[Tensor], Tensor]


class DecodeStep:
    """`step(tokens) -> logits` for the rows of a cache.

    Args:
        model: all layers, embedding and output layer (one pipeline stage).
        cache: as filled by the prompts.
        max_length: longest row.
    """

    def __init__(self, model: LanguageModel, cache: Cache, max_length: int):
        self.model, self.cache = model, cache
        self.layers = [DecodeLayer(layer) for layer in model.decoder.layers]
        self.shape = model.config.shape
        self.device = model.output_weight().device
        self.dtype = model.config.params_dtype
        self.vocab_size = self.shape.vocab_size
        self.stretches = (self.shape.rope_scaling or {}).get("rope_type") in LENGTH_DEPENDENT
        self.table = None if self.stretches else self._table(torch.arange(max_length), None)
        self.output = _output(model)
        self.slow_kernel = self.device.type == "cpu" and self.dtype in (torch.bfloat16, torch.float16)

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row.

        Args:
            tokens: [b].

        Returns:
            Logits [b, v] for the tokens after them.
        """
        with without_onednn(self.slow_kernel and len(tokens) == 1):
            return self._step(tokens)

    def _step(self, tokens: Tensor) -> Tensor:
        lengths = self.cache.lengths
        positions = torch.tensor(lengths, device=self.device)
        if self.stretches:
            # The frequencies belong to one length, so such a model answers one row at a time.
            table = self._table(positions, lengths[0] + 1)
        else:
            table = self.table[:, positions]
        # [2, b, 1, 1, r/2] -> [2, 1, b, 1, r/2]: a sequence of one.
        table = table.transpose(1, 2)
        where = Positions(lengths, positions)
        hidden = self.model.embedding(input_ids=tokens[:, None], position_ids=None)[0]
        for layer in self.layers:
            hidden = layer.step(hidden, table, self.cache, where)
        self.cache.lengths = [n + 1 for n in lengths]
        return self.output(self.model.decoder.final_layernorm(hidden))[:, : self.vocab_size]

    def _table(self, positions: Tensor, seq_len: int | None) -> Tensor:
        """cos and sin, [2, positions, 1, 1, r/2]."""
        inv_freq, factor = rope_frequencies(self.shape, seq_len)
        return rotary_table(positions[None].to(self.device), inv_freq.to(self.device), factor, self.dtype)


class ModelStep:
    """What `DecodeStep` does, by the model's own forward pass: for layers that it has no lean form of."""

    def __init__(self, model: LanguageModel, cache: Cache):
        self.model, self.cache = model, cache

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row: [b] -> logits [b, v]; rows of one length at a time."""
        logits: dict[int, Tensor] = {}
        by_length: dict[int, list[int]] = {}
        for row, length in enumerate(self.cache.lengths):
            by_length.setdefault(length, []).append(row)
        for length, rows in by_length.items():
            context = self.cache.rows(rows)
            positions = torch.full((1, 1), length, device=tokens.device)
            out = self.model(tokens[rows][:, None], position_ids=positions, inference_context=context)
            context.advance(1)
            logits.update(zip(rows, out[:, -1]))
        return torch.stack([logits[row] for row in range(len(tokens))])


def decode_step(model: LanguageModel, cache: Cache, max_length: int) -> DecodeStep | ModelStep:
    """How one token more is computed for this model; arguments as of `DecodeStep`."""
    plain = all(
        isinstance(layer.self_attention, SelfAttention) and isinstance(layer.mlp, MLP) for layer in model.decoder.layers
    )
    plain = plain and model.config.shape.attention_softcap is None  # which torch's fused attention does not have
    return DecodeStep(model, cache, max_length) if plain else ModelStep(model, cache)


class Positions:
    """Where this step's tokens stand in the cache, and what each of them sees."""

    def __init__(self, lengths: list[int], positions: Tensor):
        self.positions = positions
        self.rows = torch.arange(len(lengths), device=positions.device)
        self.longest = max(lengths)
        self.equal = min(lengths) == self.longest
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window_size: int | None) -> Tensor:
        """Boolean [b, 1, 1, longest + 1]: the cached positions that each row's token sees."""
        if window_size not in self._masks:
            keys, own = torch.arange(self.longest + 1, device=self.positions.device), self.positions[:, None]
            seen = keys <= own
            if window_size is not None:
                seen &= keys > own - window_size
            self._masks[window_size] = seen[:, None, None]
        return self._masks[window_size]


class DecodeLayer:
    """One layer's part of a step."""

    def __init__(self, layer: nn.Module):
        attention = layer.self_attention
        assert isinstance(attention, SelfAttention), type(attention)
        self.number = attention.layer_number
        self.window_size = attention.core_attention.window_size
        self.groups, self.head_dim = attention.num_query_groups_per_partition, attention.head_dim
        self.input_norm, self.mlp_norm = layer.input_layernorm, layer.pre_mlp_layernorm
        self.query_norm, self.key_norm = attention.q_layernorm, attention.k_layernorm
        self.qkv, self.projection = applied(attention.linear_qkv), applied(attention.linear_proj)
        self.fc1, self.activate, self.fc2 = (
            applied(layer.mlp.linear_fc1),
            layer.mlp.activate,
            applied(layer.mlp.linear_fc2),
        )

    def step(self, hidden: Tensor, table: Tensor, cache: Cache, where: Positions) -> Tensor:
        """[b, h] -> [b, h]."""
        hidden = hidden + self.projection(self.attend(self.qkv(self.input_norm(hidden)), table, cache, where))
        return hidden + self.fc2(self.activate(self.fc1(self.mlp_norm(hidden))))

    def attend(self, qkv: Tensor, table: Tensor, cache: Cache, where: Positions) -> Tensor:
        """Output of linear_qkv [b, g (n/g + 2) d] -> [b, n d], with this token's key and value stored."""
        qkv = qkv.view(len(qkv), self.groups, -1, self.head_dim)
        turning, value = qkv[:, :, :-1], qkv[:, :, -1]
        if self.query_norm is not None:
            turning = torch.cat((self.query_norm(qkv[:, :, :-2]), self.key_norm(qkv[:, :, -2:-1])), dim=2)
        turned = rotate(turning[None], table, torch.empty_like(turning, memory_format=torch.contiguous_format)[None])[0]
        keys, values = cache.layers[self.number]
        turned, value = turned.to(keys.dtype), value.to(keys.dtype)
        first, stop, mask = 0, where.longest + 1, None
        if where.equal:
            keys[:, :, where.longest], values[:, :, where.longest] = turned[:, :, -1], value
            if self.window_size is not None:
                first = max(0, stop - self.window_size)
        else:
            keys[where.rows, :, where.positions] = turned[:, :, -1]
            values[where.rows, :, where.positions] = value
            mask = where.mask(self.window_size)
        # A group's queries stand where a sequence would: no key is copied for its several queries.
        context = F.scaled_dot_product_attention(
            turned[:, :, :-1], keys[:, :, first:stop], values[:, :, first:stop], attn_mask=mask
        )
        return context.reshape(len(qkv), -1).to(qkv.dtype)


def applied(linear: nn.Module) -> Linear:
    """x [b, in] -> [b, out] with the bias added, by the shortest way that gives the linear's result."""
    plain = type(linear) in (ColumnParallelLinear, RowParallelLinear)
    if plain and linear.tp_group.size() == 1 and isinstance(linear.weight, Tensor):
        weight, bias = linear.weight, linear.bias
        return lambda x: F.linear(x, weight, bias)

    def through_module(x: Tensor) -> Tensor:
        out, bias = linear(x[None])
        return out[0] if bias is None else out[0] + bias

    return through_module


def _output(model: LanguageModel) -> Linear:
    """[b, h] -> logits [b, padded v] of all ranks."""
    weight = model.output_weight()
    if model.tp_group.size() == 1 and not hasattr(model.output_layer, "lora_A"):
        return lambda x: F.linear(x, weight)
    return lambda x: model.output_layer(x[None], weight=weight, runtime_gather_output=True)[0][0]


@contextmanager
def without_onednn(switch: bool):
    """Where `switch`, linears run without oneDNN: for one bf16 row its product reads memory at half torch's own rate
    (measured with torch 2.13 on an AMD EPYC with AVX512-BF16; benchmarks/generate.py shows it)."""
    if not switch:
        yield
        return
    before = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)[0]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before, _fp32_precision=None)
