"""Variants of LoRA (rank-stabilised, DoRA, LoRA+, patterns) against peft, and what a frozen base does not compute."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_llm.errors import UserError

TUNE = (
    "--stage sft --prompt-type chatml --seq-length 128 --lr 2e-2 --lr-decay-style constant --global-batch-size 4 "
    "--split 1 --progress lines --num-threads 1"
)
# name -> (what peft is told, what our options say about the same)
VARIANTS = {
    "rank-stabilised": (dict(use_rslora=True), "--use-rslora"),
    "DoRA": (dict(use_dora=True), "--use-dora"),
    "patterns": (
        dict(rank_pattern={"v_proj": 2, "down_proj": 6}, alpha_pattern={r".*self_attn\.o_proj": 5}),
        r"--lora-rank-pattern v_proj=2 down_proj=6 --lora-alpha-pattern .*self_attn\.o_proj=5",
    ),
    "all of it": (
        dict(use_rslora=True, use_dora=True, rank_pattern={"q_proj": 2}, layers_to_transform=[1, 3]),
        "--use-rslora --use-dora --lora-rank-pattern q_proj=2 --lora-layers-to-transform 1 3",
    ),
}
PARTS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def peft_model(base, parts=PARTS, **settings):
    """Transformers' model with peft's adapters, B and magnitudes moved away from where they start."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=parts, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05)
            if "lora_magnitude" in name:
                parameter.mul_(1.0 + 0.2 * torch.rand_like(parameter))
    return model


def loss_of(logits, tokens):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@pytest.mark.parametrize("family, variant", [*(("toy_llama", name) for name in VARIANTS), ("toy_qwen", "DoRA")])
def test_logits_and_gradients_are_those_of_peft(family, variant, request, tokens, tmp_path):
    """Qwen2 has biases, which magnitudes leave alone."""
    from mindspeed_llm import load_model
    from mindspeed_llm.lora.inject import adapted_modules

    base = request.getfixturevalue(family)
    theirs = peft_model(base, **VARIANTS[variant][0])
    theirs.save_pretrained(tmp_path / "peft")
    expected = theirs(input_ids=tokens).logits
    loss_of(expected, tokens).backward()
    model = load_model(base, tmp_path / "peft", dtype="fp32", device="cpu").model
    found = model(tokens, gather_logits=True)
    assert float((found - expected).abs().max()) < 1e-4
    loss_of(found, tokens).backward()
    ours = {}
    for path, module in adapted_modules(model).items():
        start, layer = 0, path.split(".")[2]
        for part in module.adapter_parts:
            rank = module.ranks[part]
            ours[layer, part, "lora_A"] = module.lora_A.grad[start : start + rank]
            ours[layer, part, "lora_B"] = module.lora_B[part].grad
            if module.uses_dora:
                ours[layer, part, "lora_magnitude_vector"] = module.lora_magnitude[part].grad
            start += rank
    gradients = {
        (name.split(".")[4], name.split(".")[6], name.split(".")[7]): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert ours.keys() == gradients.keys()
    worst = max(float((ours[k] - gradients[k]).abs().max() / gradients[k].abs().max()) for k in gradients)
    assert worst < 1e-4


def test_magnitudes_of_embedding_and_output_layer_are_those_of_peft(
    toy_llama, our_logits, hf_logits, convert_door, tokens, tmp_path
):
    from mindspeed_llm import load_model
    from mindspeed_llm.checkpoint.toy import make_toy

    parts = ["embed_tokens", "lm_head", "q_proj"]
    theirs = peft_model(toy_llama, parts, use_dora=True)
    theirs.save_pretrained(tmp_path / "peft")
    expected = theirs(input_ids=tokens).logits
    loss_of(expected, tokens).backward()
    model = load_model(toy_llama, tmp_path / "peft", dtype="fp32", device="cpu").model
    loss = model(tokens, labels=tokens.roll(-1, 1)).sum()
    logits = model(tokens, gather_logits=True)
    assert float((logits - expected).abs().max()) < 1e-4
    targets = tokens.roll(-1, 1).flatten()
    assert float(loss) == pytest.approx(
        float(nn.functional.cross_entropy(expected.flatten(0, 1), targets, reduction="sum"))
    )
    loss_of(logits, tokens).backward()
    for path, module in (("embed_tokens", model.embedding.word_embeddings), ("lm_head", model.output_layer)):
        (wanted,) = [p.grad for n, p in theirs.named_parameters() if path in n and "magnitude" in n]
        found = module.lora_magnitude[path].grad[: len(wanted)]
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4
    convert_door(
        f"--load-dir {toy_llama} --lora-load {tmp_path / 'peft'} --save-model-type hf --save-dir {tmp_path / 'm'}"
    )
    convert_door(
        f"--load-dir {toy_llama} --lora-load {tmp_path / 'peft'} --save-lora-to-hf --save-dir {tmp_path / 'again'}"
    )
    for other in (
        hf_logits(tmp_path / "m"),
        hf_logits(toy_llama, tmp_path / "again"),
        our_logits(toy_llama, tmp_path / "peft", merge=True),
    ):
        assert float((other - expected).abs().max()) < 1e-4
    other, saved = make_toy("llama", tmp_path / "other", seed=3), tmp_path / "peft" / "adapter_model.safetensors"
    with pytest.raises(UserError, match="embed_tokens.base_layer.weight there is another matrix"):
        our_logits(other, tmp_path / "peft")
    # PEFT's older form, a damaged one, and none.
    torch.save(load_file(saved), saved.with_suffix(".bin"))
    saved.unlink()
    assert float((our_logits(toy_llama, tmp_path / "peft") - expected).abs().max()) < 1e-4
    with pytest.raises(UserError, match="embed_tokens.base_layer.weight there is another matrix"):
        our_logits(other, tmp_path / "peft")
    for content, said in (
        (saved.with_suffix(".bin").read_bytes()[:-500], "is damaged"),
        (None, f"has no {saved.name}"),
    ):
        saved.with_suffix(".bin").unlink()
        if content is not None:
            saved.with_suffix(".bin").write_bytes(content)
        with pytest.raises(UserError, match=said):
            our_logits(other, tmp_path / "peft")


@pytest.fixture(scope="module")
def tuned_variant(toy_llama, post_train, rows, tmp_path_factory):
    """variant -> adapter checkpoint of three iterations by the door."""
    made = {}

    def make(variant):
        if variant not in made:
            out = tmp_path_factory.mktemp("variant") / "out"
            flags = f"--load {toy_llama} --data-path {rows} --train-iters 3 --lora-r 4 --lora-alpha 12 --save {out}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MINDSPEED_LLM_CACHE", str(out.parent / "cache"))
                post_train(TUNE, flags, f"--lora-target-modules {' '.join(PARTS)}", VARIANTS[variant][1])
            made[variant] = out
        return made[variant]

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_one_function_in_every_form(
    variant, toy_llama, tuned_variant, our_logits, hf_logits, convert_door, tmp_path
):
    adapters = tuned_variant(variant)
    convert_door(f"--load-dir {toy_llama} --lora-load {adapters} --save-lora-to-hf --save-dir {tmp_path / 'peft'}")
    convert_door(f"--load-dir {toy_llama} --lora-load {adapters} --save-model-type hf --save-dir {tmp_path / 'merged'}")
    beside = our_logits(toy_llama, adapters)
    others = {
        "merged in memory": our_logits(toy_llama, adapters, merge=True),
        "exported to PEFT": hf_logits(toy_llama, tmp_path / "peft"),
        "merged on disk": hf_logits(tmp_path / "merged"),
        "read back from PEFT": our_logits(toy_llama, tmp_path / "peft"),
    }
    largest = float(beside.abs().max().clamp_min(1.0))
    far = {name: d for name, o in others.items() if (d := float((o - beside).abs().max()) / largest) > 1e-5}
    assert far == {}
    assert float((our_logits(toy_llama) - beside).abs().max()) > 1e-2
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    for name, value in VARIANTS[variant][0].items():
        if name.startswith("use_"):
            assert config[name] is value


def test_a_magnitude_that_is_lost_is_noticed(toy_llama, tuned_variant, our_logits, convert_door, tmp_path):
    from safetensors.torch import save_file

    convert_door(
        f"--load-dir {toy_llama} --lora-load {tuned_variant('DoRA')} --save-lora-to-hf --save-dir {tmp_path / 'peft'}"
    )
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    assert sum("lora_magnitude_vector" in name for name in tensors) == 4 * len(PARTS)
    tensors.pop(next(name for name in tensors if "lora_magnitude_vector" in name))
    save_file(tensors, path)
    with pytest.raises(UserError, match="magnitude of decoder.layers.* is None"):
        our_logits(toy_llama, tmp_path / "peft")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--use-rslora", "--use-rslora: True contradicts the adapters in"),
        ("--use-dora", "--use-dora: True contradicts"),
        ("--lora-rank-pattern v_proj=3", "--lora-rank-pattern: .* contradicts"),
        ("--lora-alpha-pattern v_proj=3", "--lora-alpha-pattern: .* contradicts"),
        ("--lora-layers-to-transform 0 1", "--lora-layers-to-transform: .* contradicts"),
    ],
)
def test_variants_that_contradict_the_checkpoint_are_refused(flags, message, toy_llama, tuned_variant, convert_door):
    adapters = tuned_variant("patterns")
    with pytest.raises(UserError, match=message):
        convert_door(f"--load-dir {toy_llama} --lora-load {adapters} --save-dir {adapters.parent / 'x'} {flags}")


def test_repeating_the_variant_is_fine(toy_llama, tuned_variant, convert_door, tmp_path):
    flags = VARIANTS["all of it"][1]
    adapters = tuned_variant("all of it")
    convert_door(f"--load-dir {toy_llama} --lora-load {adapters} --save-dir {tmp_path / 'x'} {flags}")


def test_magnitudes_beside_a_trained_weight_are_refused(toy_llama, post_train, rows):
    flags = f"--load {toy_llama} --data-path {rows} --train-iters 1 --lora-r 4 --use-dora --trainable linear_fc2"
    with pytest.raises(UserError, match="--use-dora: .*linear_fc2 is trained itself"):
        post_train(TUNE, flags)


def test_lora_plus_moves_b_faster_and_a_alike(toy_llama, post_train, rows, tmp_path):
    """A step of Adam does not depend on the size of the gradient, and A has none in the first while B is zero."""
    from mindspeed_llm.lora.initial import initial_a

    moved = {}
    for ratio in (1, 4):
        out = tmp_path / f"out{ratio}"
        flags = f"--load {toy_llama} --data-path {rows} --train-iters 2 --save-interval 1 --weight-decay 0 --save {out}"
        post_train(TUNE, flags, f"--lora-r 4 --lora-target-modules q_proj --loraplus-lr-ratio {ratio}")
        (path, _), first = next(iter(adapters_of(out, toy_llama, step=1).items()))
        after = adapters_of(out, toy_llama)[path, "q_proj"]
        start = initial_a(path, {"q_proj": 4}, first.a.shape[1], 1234)
        assert torch.equal(first.a, start)
        moved[ratio] = float(first.b.abs().max()), float((after.a - start).abs().max())
    assert moved[1][0] == pytest.approx(2e-2, rel=1e-3) and moved[4][0] == pytest.approx(8e-2, rel=1e-3)
    assert moved[4][1] == pytest.approx(moved[1][1], rel=1e-2) and moved[1][1] > 1e-3


def adapters_of(directory, base, step=None):
    from mindspeed_llm.checkpoint.detect import open_source
    from mindspeed_llm.lora.tensors import read_adapters
    from mindspeed_llm.plan.adapters import AdapterSettings
    from mindspeed_llm.plan.source import find_source

    found = find_source(directory, step)
    return read_adapters(found.directory, open_source(base).shape, AdapterSettings.from_json(found.record["adapters"]))


def test_a_resumed_run_keeps_its_variant(toy_llama, post_train, rows, tmp_path):
    run = f"{TUNE} --load {toy_llama} --data-path {rows} --train-iters 4"
    variant = (
        "--lora-r 4 --lora-target-modules wq wv linear_fc2 --use-dora --lora-rank-pattern wv=2 --loraplus-lr-ratio 4"
    )
    post_train(run, f"--save {tmp_path / 'whole'}", variant)
    out = tmp_path / "out"
    post_train(run, f"--save {out} --exit-interval 2", variant)
    post_train(run, f"--save {out} --lora-load {out}")
    whole, resumed = (adapters_of(directory, toy_llama) for directory in (tmp_path / "whole", out))
    for place, one in whole.items():
        other = resumed[place]
        assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b)
        assert torch.equal(one.magnitude, other.magnitude)


class Products(TorchDispatchMode):
    """Multiply-adds of matrix products, twice counted as usual."""

    NAMES = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in self.NAMES:
            left, right = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def built(toy_llama, monkeypatch):
    """built(flags) -> (plan, TrainingModel) as the door makes them."""
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.plan.plan import resolve
    from mindspeed_llm.training.setup import build, start_processes

    def make(flags):
        words = f"--load {toy_llama} --stage sft --prompt-type chatml --seq-length 24 --num-threads 1 {flags}"
        parsed = parse("posttrain", words.split())
        plan = resolve(parsed.config, parsed.problems)
        start_processes(plan)
        return plan, build(plan)

    return make


def backward_flops(chunk, tokens):
    """Of one backward pass over the loss of these rows."""
    loss = chunk(tokens, labels=tokens)
    with Products() as products:
        loss.sum().backward()
    return products.flops


def test_nothing_is_computed_below_the_first_adapter_and_for_frozen_weights(built, tokens):
    """Factors' gradients and the way from one adapter to the next; the loss has its own gradient since the forward."""
    last = "--lora-r 4 --lora-layers-to-transform 3 --lora-target-modules"
    plan, model = built(f"{last} linear_fc2")
    chunk, shape, count, r = model.wrapped[0], plan.shape, tokens.numel(), 4
    h, f = shape.hidden_size, shape.ffn_hidden_size
    down = h * r + h * r + r * f
    assert backward_flops(chunk, tokens) == 2 * count * down
    seen = []
    below = next(m for n, m in chunk.named_modules() if n.endswith("layers.2"))
    below.register_forward_hook(lambda module, inputs, output: seen.append(output[0].requires_grad))
    chunk(tokens, labels=tokens)
    assert seen == [False]
    _, model = built(f"{last} linear_fc1 linear_fc2")
    through_fc2, up = h * f + r * f, 2 * f * r + 2 * f * r + r * h
    assert backward_flops(model.wrapped[0], tokens) == 2 * count * (down + through_fc2 + up)


def test_a_trained_base_costs_its_gradients_and_is_seen_to(built, tokens):
    """The same count with weights that are trained: as many products more as these weights have elements."""
    flags = "--lora-r 4 --lora-layers-to-transform 3 --lora-target-modules linear_fc1 linear_fc2 --no-lora-fusion"
    trained = r"--trainable layers\.3\.mlp\.linear_fc2"
    counts = [backward_flops(built(f"{flags} {more}")[1].wrapped[0], tokens) for more in ("", trained)]
    plan, _ = built(flags)
    weights = plan.shape.hidden_size * plan.shape.ffn_hidden_size
    assert counts[1] - counts[0] == 2 * tokens.numel() * weights


@pytest.mark.parametrize("more", ["", "--use-distributed-optimizer", "--bf16"])
def test_only_adapters_have_gradient_buffers_and_optimizer_state(built, more):
    from mindspeed_llm.checkpoint.optimizer_state import own_states
    from mindspeed_llm.training.run import make_optimizer

    plan, model = built(f"--lora-r 4 --use-dora --lora-target-modules q_proj o_proj {more}")
    optimizer, _ = make_optimizer(plan, model, 4)
    wrapped = model.wrapped[0]
    count = plan.trainable_parameters()
    buffers = sum(buffer.numel_unpadded for buffer in wrapped.buffers + wrapped.expert_parallel_buffers)
    assert buffers == count
    held = [state.parameter for state in own_states(optimizer)]
    assert sum(p.numel() for p in held) == count and all(p.requires_grad for p in held)
    frozen = [p for p in wrapped.parameters() if not p.requires_grad]
    assert frozen and not any(hasattr(p, "main_grad") for p in frozen)


def test_scaling_rules_are_those_of_the_papers(built):
    for flags, scaling in (("--use-rslora", 32 / math.sqrt(16)), ("", 2.0), ("--lora-alpha 4", 0.25)):
        _, model = built(f"--lora-r 16 {flags}")
        from mindspeed_llm.lora.inject import adapted_modules

        assert {module.kind.scaling for module in adapted_modules(model.chunks[0]).values()} == {scaling}


def test_magnitudes_start_as_the_norms_of_the_rows(built):
    from mindspeed_llm.lora.inject import adapted_modules

    _, model = built("--lora-r 4 --use-dora")
    for module in adapted_modules(model.chunks[0]).values():
        torch.testing.assert_close(module.gains(), torch.ones(module.weight.shape[0]), rtol=1e-6, atol=1e-6)
        stacked = module.stacked_rows(dict(module.lora_magnitude), torch.ones)
        torch.testing.assert_close(stacked, module.weight.norm(dim=1), rtol=1e-6, atol=1e-6)


def test_the_seed_draws_the_factors(built):
    """--seed reaches the initial factors, and nothing else does: the same seed gives the same."""
    drawn = []
    for seed in (1, 2, 1):
        _, model = built(f"--lora-r 4 --lora-target-modules q_proj --seed {seed}")
        drawn.append([p.detach().clone() for n, p in model.chunks[0].named_parameters() if n.endswith("lora_A")])
    assert len(drawn[0]) == 4
    assert all(torch.equal(one, again) and not torch.equal(one, other) for one, other, again in zip(*drawn))
    assert len({one.sum().item() for one in drawn[0]}) == 4, "every layer draws for itself"
