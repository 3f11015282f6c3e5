#!/usr/bin/env python3
"""What a frozen base in NF4 costs: bytes that are held, time of the way into NF4 and back, error.

    python benchmarks/qlora.py [--shape llama3-8b|llama2-7b|toy] [--dtype bf16|fp32] [--rounds N] [--json FILE]

The linears of one layer of the named model, random with the spread of trained ones (normal, 0.02). Bytes are counted in
the tensors that a linear holds, and for the whole model by the plan's own count. Quantising, dequantising and a copy of
the dense weights (the limit of the machine, into memory that is there already) take turns; GB/s are of the dense
weights read (quantising) or written (dequantising). The error is given beside that of rounding to the nearest value of
the published table with an exact scale for every block, computed without this library's code, and beside the bound
that the table gives: half its largest gap.

Prints a JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from measure import interleaved

from mindspeed_llm import accelerator
from mindspeed_llm.ops import registry
from mindspeed_llm.ops.nf4 import BLOCK_SIZE, NF4
from mindspeed_llm.ops.nf4_matrix import Nf4Matrix, quantize_matrix

# hidden size, feed-forward size, columns of q, columns of k and v, layers, vocabulary
SHAPES = {
    "llama3-8b": (4096, 14336, 4096, 1024, 32, 128256),
    "llama2-7b": (4096, 11008, 4096, 4096, 32, 32000),
    "toy": (256, 512, 256, 128, 4, 997),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def linears(shape: str, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """name -> weight [out, in] of one layer."""
    h, f, q, kv, _, _ = SHAPES[shape]
    sizes = {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q), "gate": (f, h), "up": (f, h), "down": (h, f)}
    generator = torch.Generator(device).manual_seed(0)
    return {
        name: (torch.randn(*size, generator=generator, device=device) * 0.02).to(dtype) for name, size in sizes.items()
    }


def memory(shape: str, held: float) -> dict[str, float]:
    """Bytes of the linears of the layers against bf16, and of the whole model with embeddings and head in bf16."""
    h, f, q, kv, layers, vocabulary = SHAPES[shape]
    inside = layers * (h * (q + 2 * kv) + q * h + 3 * h * f)
    outside = 2 * vocabulary * h + (2 * layers + 1) * h
    return {
        "linears_vs_bf16": held / 2,
        "linears_bf16_gib": 2 * inside / 2**30,
        "linears_nf4_gib": held * inside / 2**30,
        "model_bf16_gib": 2 * (inside + outside) / 2**30,
        "model_nf4_gib": (held * inside + 2 * outside) / 2**30,
    }


def errors(weights: dict[str, torch.Tensor], matrices: dict[str, Nf4Matrix]) -> dict[str, float]:
    """Errors over the scale of their block: mean and largest, and those of the table alone."""
    table = torch.tensor(NF4)
    found, exact = [], []
    for name, weight in weights.items():
        blocks = weight[: max(1, 2**20 // weight.shape[1])].float().cpu().reshape(-1, BLOCK_SIZE)
        scale = blocks.abs().amax(-1, keepdim=True)
        dense = matrices[name].cut(0, 0, blocks.numel() // weight.shape[1]).dense(torch.float32).cpu()
        found.append(((dense.reshape(-1, BLOCK_SIZE) - blocks) / scale).abs())
        exact.append((blocks / scale - table[(blocks[..., None] / scale[..., None] - table).abs().argmin(-1)]).abs())
    found, exact = torch.cat(found), torch.cat(exact)
    return {
        "mean_error": float(found.mean()),
        "largest_error": float(found.max()),
        "mean_error_of_the_table": float(exact.mean()),
        "largest_error_of_the_table": float(exact.max()),
        "half_largest_gap": float(table.diff().max() / 2),
    }


def rates(weights: dict[str, torch.Tensor], matrices: dict[str, Nf4Matrix], rounds: int) -> dict[str, Any]:
    """GB/s of dense weights: medians, and shares of the copy's rate."""
    device, wait = accelerator.current(), accelerator.current().synchronize
    targets = {name: torch.empty_like(weight) for name, weight in weights.items()}
    dtype = next(iter(weights.values())).dtype

    def copy() -> None:
        for name, weight in weights.items():
            targets[name].copy_(weight)
        wait()

    def quantize() -> None:
        for weight in weights.values():
            quantize_matrix(weight)
        wait()

    def dequantize() -> None:
        for matrix in matrices.values():
            matrix.dense(dtype)
        wait()

    seconds = interleaved({"copy": copy, "quantize": quantize, "dequantize": dequantize}, rounds)
    gigabytes = sum(weight.numel() * weight.element_size() for weight in weights.values()) / 1e9
    chosen = registry.chosen()
    return {
        "device": device.name,
        "threads": torch.get_num_threads(),
        **{f"{name}_gb_per_s": gigabytes / statistics.median(times) for name, times in seconds.items()},
        "implementations": {name: chosen[name] for name in ("quantize_nf4", "dequantize_nf4")},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dtype = DTYPES[arguments.dtype]
    weights = linears(arguments.shape, dtype, accelerator.current().current_device())
    matrices = {name: quantize_matrix(weight) for name, weight in weights.items()}
    numbers = sum(weight.numel() for weight in weights.values())
    held = sum(matrix.num_bytes for matrix in matrices.values()) / numbers
    result = {
        "shape": arguments.shape,
        "dtype": arguments.dtype,
        "bits_per_number": 8 * held,
        **memory(arguments.shape, held),
        **rates(weights, matrices, arguments.rounds),
        **errors(weights, matrices),
    }
    line = json.dumps(result)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
