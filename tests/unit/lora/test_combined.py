"""Several sets of adapters in one model: sums with weights, one at a time, in the chat by name."""

import pytest
import torch

from mindspeed_llm.errors import UserError
from mindspeed_llm.inference.chat import switch_adapters

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def sets(tuned):
    """Two sets on one base: of all linears with shared A, and of some parts."""
    base, fused = tuned("toy_llama", "fused")
    _, parts = tuned("toy_llama", "parts")
    return base, fused, parts


@torch.no_grad()
def logits(model, tokens):
    return model.model(tokens, gather_logits=True)


def distance(found, expected):
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))


@pytest.fixture(scope="module")
def both(sets):
    from mindspeed_llm import load_model

    base, fused, parts = sets
    return load_model(base, [fused, parts], lora_weights=[0.7, 0.3], dtype="fp32", device="cpu")


def test_a_combination_is_the_sum_of_the_weights_differences(sets, both, tokens, convert_door, tmp_path, our_logits):
    """Merging one after the other, each with its weight, gives the same model."""
    from mindspeed_llm import load_model

    base, fused, parts = sets
    merged = load_model(base, [fused, parts], lora_weights=[0.7, 0.3], merge=True, dtype="fp32", device="cpu")
    convert_door(
        f"--load-dir {base} --lora-load {fused} {parts} --lora-weights 0.7 0.3 --save-model-type hf "
        f"--save-dir {tmp_path / 'merged'}"
    )
    expected = base_plus(base, {fused: 0.7, parts: 0.3}, our_logits, convert_door, tmp_path)
    both.adapters.use({both.adapters.names[0]: 0.7, both.adapters.names[1]: 0.3})
    for found in (logits(both, tokens), logits(merged, tokens), our_logits(tmp_path / "merged")):
        assert distance(found, expected) < TOLERANCE
    assert distance(our_logits(base), expected) > 1e-2


def base_plus(base, weights, our_logits, convert_door, tmp_path):
    """Logits of the base plus weighted differences of merged models, tensor by tensor."""
    import shutil

    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    summed = {name: tensor.double() for name, tensor in tensors.items()}
    for number, (adapters, weight) in enumerate(weights.items()):
        out = tmp_path / f"one{number}"
        convert_door(f"--load-dir {base} --lora-load {adapters} --save-model-type hf --save-dir {out}")
        for name, tensor in load_file(out / "model.safetensors").items():
            summed[name] += weight * (tensor.double() - tensors[name].double())
    target = tmp_path / "sum"
    shutil.copytree(base, target)
    saved = {name: tensor.float() for name, tensor in summed.items()}
    save_file(saved, target / "model.safetensors", metadata={"format": "pt"})
    return our_logits(target)


def test_one_set_at_a_time_is_that_set(sets, both, tokens, our_logits):
    base, fused, parts = sets
    first, second = both.adapters.names
    for name, directory in ((first, fused), (second, parts)):
        assert switch_adapters(both, [name]).startswith(f"adapters: {name}=1")
        assert distance(logits(both, tokens), our_logits(base, directory)) < TOLERANCE
    assert switch_adapters(both, []).startswith("adapters: none")
    assert distance(logits(both, tokens), our_logits(base)) == 0.0


def test_switching_says_what_is_wrong(both):
    assert "'other' is not loaded; legal: " in switch_adapters(both, ["other"])
    assert "no number" in switch_adapters(both, [f"{both.adapters.names[0]}=much"])


def test_wrong_sets_are_refused(sets, convert_door, post_train, tmp_path):
    base, fused, parts = sets
    with pytest.raises(UserError, match="--lora-weights: 1 weights for 2 sets"):
        convert_door(f"--load-dir {base} --lora-load {fused} {parts} --lora-weights 1 --save-dir {tmp_path / 'x'}")
    with pytest.raises(UserError, match="several sets of adapters are for answering"):
        post_train(f"--stage sft --load {base} --lora-load {fused} {parts} --data-path x --train-iters 1")
