"""Kernels that torch.compile makes of operators: right, made once, and refused in a line where they cannot be made."""

import pytest
import torch

from mindspeed_llm.accelerator import host_compiler
from mindspeed_llm.config.parser import parse
from mindspeed_llm.errors import UserError
from mindspeed_llm.ops import compiled, norm, registry
from mindspeed_llm.ops.compiled import kernel as kernels
from mindspeed_llm.ops.compiled import norm as compiled_norm
from mindspeed_llm.ops.compiled import rotary as compiled_rotary
from mindspeed_llm.plan.combinations import combination_problems
from mindspeed_llm.testing import operators
from mindspeed_llm.testing.operators import elementwise

torch.set_num_threads(1)

needs_compiler = pytest.mark.skipif(host_compiler.why_not() is not None, reason="no C++ compiler")

# Operators whose kernels are compiled here, each with a case; the others' are of the same functions.
COMPILED = (
    ("add_rms_norm", "rows and batch"),
    ("gated_activation", str(elementwise.GATES[-1])),
    ("split_qkv_rotary", "positions of each row"),
    ("quantize_nf4", "whole blocks"),
    ("dequantize_nf4", "whole blocks"),
)
OF_THE_SAME = {"rms_norm", "swiglu", "rotary"}


def function_of(operator):
    return next(e.function for e in registry.implementations(operator) if e.name == compiled.NAME)


@pytest.fixture(autouse=True)
def fresh_choices():
    yield
    registry.reset()


def test_what_is_tried_here_is_all_there_is():
    assert {operator for operator, _ in COMPILED} | OF_THE_SAME == set(compiled.operators())


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("operator, name", COMPILED)
def test_a_compiled_operator_equals_the_reference(operator, name):
    case = next(c for c in elementwise.CASES if (c.operator, c.name) == (operator, name))
    half = torch.bfloat16
    reference = next(e.function for e in registry.implementations(operator) if e.name == registry.REFERENCE)
    seen = operators.evaluate(case, function_of(operator), half)
    exact = operators.evaluate(case, operators._on_doubles(reference), half)
    for one, other in zip(seen, exact, strict=True):
        assert one.dtype != torch.float64
        largest = float(other.double().abs().max())
        assert float((one.double() - other.double()).abs().max()) <= (case.half or 0.0) * largest


def normalized(rows, width, dtype=torch.bfloat16):
    x, residual = (torch.randn(rows, width, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (1, 2))
    return function_of("add_rms_norm")(x, residual, torch.ones(width, dtype=dtype), 1e-5)


@pytest.mark.parametrize("turning", (3, 4), ids=("channels left as they are", "all channels"))
def test_gradients_of_few_and_of_many_query_heads_are_put_together_alike(turning, monkeypatch):
    """As formulas, without compiling them: turning back what was turned, each head in its place."""
    qkv = torch.randn(5, 2, 4, 8)
    angles = torch.rand(5, turning)
    table = torch.stack((angles.cos(), angles.sin()))
    parts = compiled_rotary.split.function(qkv, table)
    few = compiled_rotary.join.function(*parts, table)
    monkeypatch.setattr(compiled_rotary, "MOST_APART", 1)
    many = compiled_rotary.join.function(*parts, table)
    assert torch.equal(few, many)
    torch.testing.assert_close(few.view(qkv.shape), qkv)
    swapped = compiled_rotary.join.function(parts[0].flip(2), *parts[1:], table)
    assert not torch.allclose(swapped.view(qkv.shape), qkv)


@needs_compiler
@pytest.mark.slow
def test_other_sizes_take_the_same_kernel():
    normalized(5, 16)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows, width in ((2, 16), (16, 16), (7, 33), (300, 64)):
            normalized(rows, width)
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            normalized(5, 16, torch.float16)


@needs_compiler
@pytest.mark.slow
def test_a_sum_is_normalised_to_two_roundings():
    normed, total = normalized(64, 256)
    exact = norm.rms_norm_reference(total.double(), torch.ones(256).double(), 1e-5)
    there = total != 0

    def error(found):
        """The largest, in halves of a unit of bf16: one of the sum, not rounded before, and one of the norm."""
        return float((found.double() - exact)[there].div(exact[there]).abs().max()) * 2**9

    assert error(normed) <= 2.01 < error(normed * (1 + 2**-7))


@needs_compiler
@pytest.mark.slow
def test_rows_are_divided_among_the_threads_of_the_moment(monkeypatch):
    from torch._inductor.utils import run_and_get_code  # takes seconds to import

    monkeypatch.setattr(compiled_norm.add_normalize, "_compiled", {})
    torch.set_num_threads(16)
    try:
        shared, (code,) = run_and_get_code(normalized, 70, 256)
        torch.set_num_threads(2)
        fewer = normalized(70, 256)
    finally:
        torch.set_num_threads(1)
    assert "#pragma omp parallel\n" in code and "num_threads(" not in code
    for alone, *others in zip(normalized(70, 256), shared, fewer, strict=True):
        assert all(torch.equal(alone, other) for other in others)


def problems_of(words):
    return combination_problems(parse("pretrain", words.split()).config)


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (line,) = [p for p in problems_of("--compile-operators") if "compile" in p]
    assert "it needs a C++ compiler, and there is no no-such-compiler on PATH; try: --no-compile-operators" in line
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler.* on PATH; legal: "):
        registry.select("rms_norm", compiled.NAME)


def test_where_nothing_is_compiled_it_is_refused():
    off = "--no-use-fused-rmsnorm --no-use-fused-swiglu --no-use-fused-rotary-pos-emb"
    assert any("has no meaning" in p for p in problems_of(f"--compile-operators {off}"))
    assert any("on a CPU only" in p for p in problems_of("--compile-operators --device cuda"))
    assert not any("compile" in p for p in problems_of("--compile-operators --no-use-fused-rmsnorm"))


@needs_compiler
@pytest.mark.slow
def test_a_compiler_that_fails_is_named_in_a_line(monkeypatch, tmp_path):
    broken = tmp_path / "broken-g++"
    broken.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && exec g++ --version\necho 'fatal error: omp.h' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, str(broken)))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    twice = kernels.kernel("r w")(lambda x: x * 2 + 1)
    with pytest.raises(UserError, match=r"broken-g\+\+.*omp\.h.*try: --no-compile-operators") as refused:
        twice(torch.ones(3, 4))
    assert "\n" not in str(refused.value)
