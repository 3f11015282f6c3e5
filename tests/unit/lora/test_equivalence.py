"""One set of adapters is one function: beside the base, merged in memory, exported to PEFT, merged on disk."""

import pytest

TOLERANCE = 1e-5
CASES = [(family, targets) for family in ("toy_llama", "toy_qwen") for targets in ("fused", "parts")]


def distance(found, expected):
    """max|d| of logits, relative to the largest where that is above 1."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))


@pytest.mark.parametrize("family, targets", CASES)
def test_four_ways_to_apply_adapters_agree(family, targets, tuned, our_logits, hf_logits, convert_door, tmp_path):
    base, adapters = tuned(family, targets)
    convert_door(f"--load-dir {base} --lora-load {adapters} --save-lora-to-hf --save-dir {tmp_path / 'peft'}")
    convert_door(f"--load-dir {base} --lora-load {adapters} --save-model-type hf --save-dir {tmp_path / 'merged'}")
    beside = our_logits(base, adapters)
    others = {
        "merged in memory": our_logits(base, adapters, merge=True),
        "exported to PEFT": hf_logits(base, tmp_path / "peft"),
        "merged on disk": hf_logits(tmp_path / "merged"),
        "read back from PEFT": our_logits(base, tmp_path / "peft"),
    }
    assert {name: d for name, logits in others.items() if (d := distance(logits, beside)) > TOLERANCE} == {}
    assert distance(our_logits(base), beside) > 1e-2, "the adapters do nothing, so nothing was compared"
