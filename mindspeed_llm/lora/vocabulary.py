"""Adapters of the embedding and of the output layer, whose matrices are cut by their tokens.

    embedding    y = W[x] + s A^T[x] B^T      A [r, v] cut by tokens, B [h, r] whole
    output       logits = h W^T + s (h A^T) B^T = [h, s h A^T] [W, B]^T

The loss never holds all logits and takes one matrix, so the output layer gives it the joined operands; joining copies W
in each pass. Hu et al. (2021) and PEFT start an embedding with A zero and B normal, other linears the other way round.

With DoRA each output is scaled by magnitude / norm: of an embedding [h], the norms being taken over all tokens, so that
ranks sum their squares; of the output layer [v], cut by tokens. Norms get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from mindspeed_llm.lora.initial import initial_a
from mindspeed_llm.lora.layers import squared_row_norms
from mindspeed_llm.lora.tensors import AdapterTensors
from mindspeed_llm.models.initialize import draw
from mindspeed_llm.plan.adaptable import Adaptable
from mindspeed_llm.plan.adapters import AdapterSettings


class LoraVocabularyMixin:
    """`lora_A` and `lora_B.<part>` of a matrix that is cut by tokens; `is_looked_up` for the embedding."""

    is_looked_up = False

    def add_adapter(self, linear: Adaptable, settings: AdapterSettings) -> None:
        """Register A, B and magnitudes (uninitialised); the base parameter is frozen by the caller."""
        (self.part,) = linear.parts
        self.linear, self.shape = linear, linear.parts[self.part]
        self.rank = settings.rank_of(linear.module, self.part)
        self.scaling = settings.scaling_of(linear.module, self.part)
        tokens, hidden = self.weight.shape
        width, out = (tokens, hidden) if self.is_looked_up else (hidden, tokens)
        like = dict(dtype=self.weight.dtype, device=self.weight.device)
        self.lora_A = nn.Parameter(torch.empty(self.rank, width, **like))
        self.lora_B = nn.ParameterDict({self.part: nn.Parameter(torch.empty(out, self.rank, **like))})
        cut, dim = (self.lora_A, 1) if self.is_looked_up else (self.lora_B[self.part], 0)
        tensor_parallel.set_tensor_model_parallel_attributes(cut, True, dim, 1)
        if settings.use_dora:
            magnitude = nn.Parameter(torch.empty(out, **like))
            self.lora_magnitude = nn.ParameterDict({self.part: magnitude})
            if not self.is_looked_up:
                tensor_parallel.set_tensor_model_parallel_attributes(magnitude, True, 0, 1)

    @property
    def uses_dora(self) -> bool:
        """Whether magnitudes are trained."""
        return hasattr(self, "lora_magnitude")

    @torch.no_grad()
    def output_norms(self) -> Tensor:
        """What magnitudes are divided by, fp32: [h] of the embedding, [v_local] of the output layer."""
        weight, a, b = self.weight, self.lora_A, self.lora_B[self.part].float() * self.scaling
        if self.is_looked_up:
            real = max(min(self.shape[0] - self.vocab_start_index, weight.shape[0]), 0)
            squares = squared_row_norms(weight[:real].t(), a[:, :real], b)
            if self.tp_group.size() > 1:
                dist.all_reduce(squares, group=self.tp_group)
        else:
            squares = squared_row_norms(weight, a, b)
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def gains(self) -> Tensor:
        """What each output is multiplied by: magnitude / norm."""
        magnitude = self.lora_magnitude[self.part]
        return (magnitude / self.output_norms()).to(magnitude.dtype)

    def _cut_tokens(self, by_token: Tensor) -> Tensor:
        """[v, ...] of the whole vocabulary -> this rank's rows, padding being zero."""
        rows = self.weight.shape[0]
        padding = rows * self.tp_group.size() - by_token.shape[0]
        whole = F.pad(by_token, (0, 0) * (by_token.dim() - 1) + (0, padding))
        return whole[self.tp_group.rank() * rows :][:rows]

    @torch.no_grad()
    def initialize_adapter(self, name: str, seed: int) -> None:
        """One factor drawn by (seed, name), the other zero; magnitudes are those of the weight, which must be there."""
        self.lora_A.zero_()
        self.lora_B[self.part].zero_()
        if self.is_looked_up:
            size = (self.shape[1], self.rank)
            self.lora_B[self.part].copy_(draw(seed, f"{name}.lora_B/{self.part}", size, 1.0))
        else:
            self.lora_A.copy_(initial_a(name, {"all": self.rank}, self.shape[0], seed))
        if self.uses_dora:
            self.lora_magnitude[self.part].copy_(self.output_norms())

    @torch.no_grad()
    def fill(self, path: str, tensors: AdapterTensors) -> int:
        """Copy the adapter, cut to this rank; returns the number of tensors."""
        adapter = tensors[path, self.part]
        self.lora_A.copy_(self._cut_tokens(adapter.a.t()).t() if self.is_looked_up else adapter.a)
        self.lora_B[self.part].copy_(adapter.b if self.is_looked_up else self._cut_tokens(adapter.b))
        if not self.uses_dora:
            return 2
        whole = adapter.magnitude
        self.lora_magnitude[self.part].copy_(whole if self.is_looked_up else self._cut_tokens(whole))
        return 3

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """This rank's weight with the adapter in it, fp32 [v_local, h]."""
        delta = self.scaling * (self.lora_B[self.part].float() @ self.lora_A.float())
        merged = self.weight.float() + (delta.t() if self.is_looked_up else delta)
        if not self.uses_dora:
            return merged
        gains = self.gains().float()
        return merged * (gains if self.is_looked_up else gains[:, None])

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Sequence = (), metadata: Any = None) -> dict:
        """The base's own tensors and the factors; another layout pads the vocabulary otherwise."""
        where = dict(prepend_offsets=sharded_offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"])
        state = type(self).__bases__[-1].sharded_state_dict(self, prefix, sharded_offsets, metadata)
        for name, tensor in self.named_parameters():
            if not name.startswith("lora_"):
                continue
            key = prefix + name
            if (name == "lora_A") == self.is_looked_up:
                axis = 1 if self.is_looked_up else 0
                state[key] = make_tp_sharded_tensor_for_checkpoint(
                    tensor, key, axis, allow_shape_mismatch=True, **where
                )
            else:
                state[key] = make_sharded_tensor_for_checkpoint(tensor, key, **where)
        return state


class LoraEmbedding(LoraVocabularyMixin, tensor_parallel.VocabParallelEmbedding):
    """An embedding with an adapter."""

    is_looked_up = True

    def add_adapter(self, linear: Adaptable, settings: AdapterSettings) -> None:
        """As of the mixin."""
        super().add_adapter(linear, settings)
        # Used with a shard of the sequence: its gradient is a share of the sum over tensor-parallel ranks.
        for parameter in (self.lora_B, *([self.lora_magnitude] if self.uses_dora else [])):
            parameter[self.part].sequence_parallel = self.reduce_scatter_embeddings

    def forward(self, input_: Tensor) -> Tensor:
        """Token ids [b, s] -> [b, s, h], or [s / t, b, h] under sequence parallelism."""
        base = tensor_parallel.VocabParallelEmbedding.forward(self, input_)
        outside = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
        local = (input_ - self.vocab_start_index).masked_fill(outside, 0)
        narrow = F.embedding(local, self.lora_A.t()).masked_fill(outside.unsqueeze(-1), 0.0)
        if self.reduce_scatter_embeddings:
            narrow = narrow.transpose(0, 1).contiguous()
            narrow = tensor_parallel.reduce_scatter_to_sequence_parallel_region(narrow, group=self.tp_group)
        else:
            narrow = tensor_parallel.reduce_from_tensor_model_parallel_region(narrow, group=self.tp_group)
        out = base + F.linear(narrow, self.lora_B[self.part]) * self.scaling
        return out * self.gains() if self.uses_dora else out


class LoraOutputLayer(LoraVocabularyMixin, tensor_parallel.ColumnParallelLinear):
    """An output layer with an adapter; a loss that multiplies by its weight asks for `joined_operands`."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] (a rank's share of s under sequence parallelism) -> logits of this rank's or of all tokens."""
        plain = tensor_parallel.ColumnParallelLinear.forward
        logits, bias = plain(self, input_, weight, runtime_gather_output)
        gathers = self.gather_output if runtime_gather_output is None else runtime_gather_output
        group = dict(group=self.tp_group)
        if self.sequence_parallel:
            a = tensor_parallel.copy_to_tensor_model_parallel_region(self.lora_A, **group)
            narrow = tensor_parallel.gather_from_sequence_parallel_region(F.linear(input_, a), **group)
        else:
            narrow = tensor_parallel.copy_to_tensor_model_parallel_region(F.linear(input_, self.lora_A), **group)
        added = F.linear(narrow, self.lora_B[self.part]) * self.scaling
        if gathers:
            added = tensor_parallel.gather_from_tensor_model_parallel_region(added, **group)
        if not self.uses_dora:
            return logits + added, bias
        gains = self.gains()
        if gathers:
            gains = tensor_parallel.gather_from_tensor_model_parallel_region(gains, **group)
        return (logits + added) * gains, bias

    def joined_operands(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """[..., h] and [v_local, h] -> [..., h + r] and [v_local, h + r], whose product has the adapter in it.

        The gradient of A is a share of a sum here, since every rank multiplies by its own tokens; it is summed.
        """
        a = tensor_parallel.copy_to_tensor_model_parallel_region(self.lora_A, group=self.tp_group)
        narrow = F.linear(hidden, a) * self.scaling
        joined = torch.cat((weight, self.lora_B[self.part]), dim=1)
        return torch.cat((hidden, narrow), dim=-1), joined * self.gains()[:, None] if self.uses_dora else joined
