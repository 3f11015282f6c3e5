"""The kernels of adapters compiled for GPUs that are not here, as they are launched at the sizes of an 8B model."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mindspeed_llm.ops.adapter import CounterMask
from mindspeed_llm.ops.cuda import adapter_kernels as kernels

# Shared memory that two programs of a multiprocessor can have each: half of an A100's 164 KiB, of an H100's 228 KiB.
SHARED = {80: 82 << 10, 90: 114 << 10}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
# Llama-3-8B's fc2: 4096 tokens, 14336 inputs, 4096 outputs.
TOKENS, INNER, OUTER = 4096, 14336, 4096
# Rank 16 of q, k and v side by side makes 48.
CASES = [(torch.bfloat16, 16, 0.1), (torch.bfloat16, 48, 0.0), (torch.bfloat16, 128, 0.1), (torch.float32, 64, 0.1)]


def source(launch):
    """What Triton compiles for a launch: addresses and sizes that 16 divides are known as such, ones are constants."""
    types, constants, attributes = {}, dict(launch.constants), {}
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if isinstance(value, int) and value == 1:
            constants[name] = 1
        if name in constants:
            types[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            types[name] = POINTERS[value.dtype]
        else:
            types[name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, types, constants, attributes)


def launches(dtype, rank, dropout, tokens=TOKENS):
    """One of every kernel, forward and backward, for tensors that are only described."""

    def empty(*size):
        return torch.empty(*size, dtype=dtype, device="meta")

    mask = CounterMask(dropout, torch.empty(1, dtype=torch.int64, device="meta")) if dropout else None
    x, narrow, a, b = empty(tokens, INNER), empty(tokens, rank), empty(rank, INNER), empty(OUTER, rank)
    y, weight = empty(tokens, OUTER), empty(OUTER, INNER)
    return {
        "down": kernels.launch_down(x, a, narrow, mask),
        "down gradient": kernels.launch_down_gradient(narrow, x, a, mask),
        "up": kernels.launch_up(x, narrow, a.t(), 1.0, mask),
        "product": kernels.launch_adapted_product(x, weight, None, narrow, b, y, 2.0, None),
        "product back": kernels.launch_adapted_product(y, weight.t(), None, narrow, a.t(), x, 1.0, mask),
    }


def usage(launch, capability, folder):
    """Bytes of shared memory of a program, and of the stack of a thread, where registers go that do not fit."""
    options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", capability, 32), options=options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(nvidia.__file__).with_name("bin") / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", binary], check=True, capture_output=True, text=True).stdout
    (stack,) = [int(word.removeprefix("STACK:")) for word in said.split() if word.startswith("STACK:")]
    return compiled.metadata.shared, stack


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype, rank, dropout", CASES, ids=str)
def test_it_fits_twice_into_a_multiprocessor_and_spills_nothing(dtype, rank, dropout, capability, tmp_path):
    for name, launch in launches(dtype, rank, dropout).items():
        shared, stack = usage(launch, capability, tmp_path)
        assert 0 < shared <= SHARED[capability] and stack == 0, f"{name}: {shared} bytes shared, {stack} of stack"


def test_one_token_and_rank_one_compile_too(tmp_path):
    for name, launch in launches(torch.bfloat16, 1, 0.1, tokens=1).items():
        assert usage(launch, 90, tmp_path)[1] == 0, name


def test_tiles_that_are_too_large_are_noticed(tmp_path):
    launch = launches(*CASES[0])["product"]
    large = replace(launch, constants={**launch.constants, "BLOCK_ROWS": 256, "BLOCK_OUTER": 256}, num_warps=4)
    shared, stack = usage(large, 80, tmp_path)
    assert shared > SHARED[80] and stack > 0
