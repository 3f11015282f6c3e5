"""The other side of the training benchmark: transformers (and peft) in the fastest correct form found on a CPU.

bf16 weights, fp32 master weights of what is trained, torch's fused AdamW, SDPA, on request torch.compile. Losses are
sums divided by the trained tokens of the global batch, as `Trainer` does with `num_items_in_batch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM

MASKED, PER_DOCUMENT = "sdpa", "sdpa_per_document"
# What compiles, see torch.compile.
BACKEND = "inductor"


def attention_per_document(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, document_lengths=None, **unused
):
    """SDPA of each packed document by itself: [1, heads, t, d] -> [1, t, heads, d]."""
    lengths = document_lengths.tolist()
    parts = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    outs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(*parts)
    ]
    return torch.cat(outs, dim=2).transpose(1, 2), None


AttentionInterface.register(PER_DOCUMENT, attention_per_document)


def padded_batch(samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Samples padded to the longest of them, with the attention mask that transformers' collators give."""
    width = max(len(sample["input_ids"]) for sample in samples)
    batch = {
        name: torch.full((len(samples), width), fill)
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("shift_labels", -100))
    }
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        batch["input_ids"][row, :length] = torch.from_numpy(sample["input_ids"])
        batch["shift_labels"][row, :length] = torch.from_numpy(sample["labels"])
        batch["attention_mask"][row, :length] = 1
    return batch


def packed_batch(samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Samples in one row; from positions that begin again transformers makes a mask of blocks."""
    return {
        "input_ids": torch.from_numpy(np.concatenate([sample["input_ids"] for sample in samples]))[None],
        "shift_labels": torch.from_numpy(np.concatenate([sample["labels"] for sample in samples]))[None],
        "position_ids": torch.cat([torch.arange(len(sample["input_ids"])) for sample in samples])[None],
    }


def document_batch(samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, object]:
    """Samples in one row for `PER_DOCUMENT` attention."""
    return {**packed_batch(samples), "document_lengths": torch.tensor([len(s["input_ids"]) for s in samples])}


class Peer:
    """A model of transformers with its optimizer.

    Args:
        directory: HF model.
        lora_targets, lora_rank: linears with adapters; () trains everything.
        learning_rate: of AdamW.
        compiled: each layer and the loss by torch.compile, for rows of any length. Attention document by document
            stays outside: inside it would be compiled anew for every row, whose documents have other lengths.
    """

    def __init__(
        self,
        directory: str,
        lora_targets: Sequence[str],
        lora_rank: int,
        learning_rate: float,
        compiled: bool = False,
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation=MASKED)
        self.base = model
        if lora_targets:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=list(lora_targets))
            model = get_peft_model(model, config, autocast_adapter_dtype=False)
        self.model = model.train()
        if compiled:
            AttentionInterface.register(PER_DOCUMENT, torch.compiler.disable(attention_per_document))
            for layer in self.base.model.layers:
                layer.compile(dynamic=True, backend=BACKEND)
            self.base.loss_function = torch.compile(self.base.loss_function, dynamic=True, backend=BACKEND)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters = [parameter.detach().float() for parameter in self.trained]
        self.optimizer = torch.optim.AdamW(self.masters, lr=learning_rate, fused=True)

    def step(self, batches: Sequence[Mapping[str, object]], attention: str = MASKED) -> float:
        """One optimizer step over micro-batches; returns the mean loss of the trained tokens."""
        self.base.set_attn_implementation(attention)
        trained_tokens = sum(int((batch["shift_labels"] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            # labels make transformers compute the loss; shift_labels are the ones it uses.
            loss = self.model(
                **batch, labels=batch["shift_labels"], num_items_in_batch=trained_tokens, use_cache=False
            ).loss
            loss.backward()
            total += loss.item()
        for master, parameter in zip(self.masters, self.trained):
            master.grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.trained, self.masters)
        return total
