"""Whole small runs through the training doors, in this process."""

import json

import pytest
import torch

from mindspeed_llm.errors import UserError


def losses(result):
    return [loss for _, loss in result.history.train]


SFT = "--stage sft --prompt-type chatml --seq-length 256 --lr 1e-3 --global-batch-size 4 --split 80,20"
TEXT = "--seq-length 64 --lr 1e-3 --global-batch-size 4 --micro-batch-size 2 --split 90,10"


@pytest.mark.parametrize("more", ["", "--no-padding-free", "--no-padding-free --pad-to-seq-length"])
@pytest.mark.parametrize("micro", [1, 4])
def test_the_loss_does_not_depend_on_micro_batches_or_padding(door, toy_llama, instructions, micro, more):
    base = door("posttrain", SFT, f"--load {toy_llama} --data-path {instructions} --train-iters 3 --micro-batch-size 2")
    run = f"--load {toy_llama} --data-path {instructions} --train-iters 3 --micro-batch-size {micro}"
    found = door("posttrain", SFT, run, more)
    assert losses(found) == pytest.approx(losses(base), rel=1e-5)


@pytest.mark.parametrize("pack", ["--pack", "--neat-pack"])
def test_packed_documents_give_the_loss_they_give_apart(door, toy_llama, instructions, pack):
    everything = f"--load {toy_llama} --data-path {instructions} --eval-only --split 0,1 --eval-iters 100"
    flags = "--stage sft --prompt-type chatml --seq-length 256 --global-batch-size 1"
    single, packed = (door("posttrain", flags, everything, more).evaluation for more in ("", pack))
    assert packed.batches < single.batches
    assert packed.trained_tokens == single.trained_tokens
    assert packed.loss == pytest.approx(single.loss, rel=1e-6)


@pytest.mark.parametrize(
    "kind, more",
    [
        ("pretrain", "--hidden-dropout 0.1"),
        ("pretrain", "--bf16 --use-distributed-optimizer"),
        ("posttrain", "--lora-r 4 --lora-dropout 0.1"),
        ("posttrain", "--neat-pack --bf16"),
    ],
)
def test_six_iterations_are_three_and_three_more(door, toy_llama, corpus, instructions, tmp_path, kind, more):
    data = corpus if kind == "pretrain" else instructions
    flags = f"{TEXT if kind == 'pretrain' else SFT} --train-iters 6 --eval-iters 0 {more}"
    whole = door(kind, flags, f"--load {toy_llama} --data-path {data}")
    out = tmp_path / "out"
    door(kind, flags, f"--load {toy_llama} --data-path {data} --save {out} --exit-interval 3")
    again = f"--lora-load {out} --load {toy_llama}" if "lora" in more else f"--load {out}"
    rest = door(kind, flags.replace("--lora-r 4", ""), again, f"--save {out}")
    assert losses(rest) == losses(whole)[3:]


def test_a_resume_takes_over_what_is_not_given_and_refuses_what_changed(door, toy_llama, corpus, tmp_path):
    out = tmp_path / "out"
    door("pretrain", TEXT, f"--load {toy_llama} --data-path {corpus} --train-iters 2 --save {out}")
    more = door("pretrain", f"--load {out} --save {out} --train-iters 3 --lr 1e-3 --micro-batch-size 2")
    assert more.progress.consumed_samples == 12
    with pytest.raises(UserError) as refused:
        door(
            "pretrain", f"--load {out} --save {out} --train-iters 4 --seed 7 --global-batch-size 8 --micro-batch-size 2"
        )
    assert "--seed was 1234 and is now 7" in str(refused.value)
    assert "--global-batch-size was 4 and is now 8" in str(refused.value)
    allowed = f"--load {out} --save {out} --train-iters 4 --seed 7 --allow-change seed --micro-batch-size 2"
    assert door("pretrain", allowed).progress.iteration == 4


def test_a_directory_with_checkpoints_is_not_written_over(door, toy_llama, corpus, tmp_path):
    flags = f"--load {toy_llama} --data-path {corpus} --train-iters 1 --save {tmp_path / 'out'}"
    door("pretrain", TEXT, flags)
    with pytest.raises(UserError, match="already holds a checkpoint; try: --load"):
        door("pretrain", TEXT, flags)


@pytest.mark.parametrize(
    "precision", ["--bf16", "--fp16 --initial-loss-scale 1024", "--bf16 --use-distributed-optimizer"]
)
def test_reduced_precision_follows_fp32(door, toy_llama, corpus, precision):
    flags = f"{TEXT} --load {toy_llama} --data-path {corpus} --train-iters 4"
    exact, found = losses(door("pretrain", flags)), losses(door("pretrain", flags, precision))
    assert found == pytest.approx(exact, rel=2e-2)
    assert found != exact
    assert found[-1] < found[0]


@pytest.mark.parametrize("off", ["flash-attn", "fused-rmsnorm", "fused-swiglu", "fused-rotary-pos-emb"])
def test_fused_operators_equal_the_plain_ones(door, toy_llama, instructions, off):
    flags = f"{SFT} --load {toy_llama} --data-path {instructions} --train-iters 2 --micro-batch-size 2"
    fused, plain = door("posttrain", flags), door("posttrain", flags, f"--no-use-{off}")
    assert losses(plain) == pytest.approx(losses(fused), rel=1e-5)


def learning_rates(text):
    lines = [line for line in text.splitlines() if "learning rate: " in line]
    return [float(line.split("learning rate: ")[1].split(" ")[0]) for line in lines]


def test_the_schedules_give_the_learning_rates_they_promise(door, toy_llama, corpus, capsys):
    flags = f"{TEXT} --load {toy_llama} --data-path {corpus} --train-iters 4 --eval-iters 0 --min-lr 1e-4"
    for style, rates in {
        "constant": [1e-3, 1e-3, 1e-3, 1e-3],
        "linear": [1e-3, 7.75e-4, 5.5e-4, 3.25e-4],
        "cosine": [1e-3, 8.681981e-4, 5.5e-4, 2.318019e-4],
        "WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 2": [1e-3, 1e-3, 1e-3, 5.5e-4],
        "linear --lr-warmup-iters 2": [0.0, 5e-4, 1e-3, 5.5e-4],
    }.items():
        capsys.readouterr()
        door("pretrain", flags, f"--lr-decay-style {style}")
        said = learning_rates(capsys.readouterr().out)
        assert said == pytest.approx(rates, rel=1e-5, abs=1e-12), style


def test_partial_training_moves_only_what_is_trained(door, toy_llama, instructions, tmp_path):
    from mindspeed_llm.checkpoint.detect import open_source

    out = tmp_path / "out"
    flags = (
        f"{SFT} --load {toy_llama} --data-path {instructions} --train-iters 2 --save {out} --trainable-layers last:1"
    )
    door("posttrain", flags)
    before, after = open_source(toy_llama), open_source(out)
    moved = {name for name in before.names() if not torch.equal(before.read(name), after.read(name))}
    assert moved == {name for name in before.names() if ".layers.3." in name}
    with pytest.raises(UserError, match="'nothing' matches no parameter"):
        door("posttrain", f"{SFT} --load {toy_llama} --data-path {instructions} --train-iters 1 --freeze nothing")


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state(toy_llama, instructions):
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.plan.plan import resolve
    from mindspeed_llm.training.run import make_optimizer
    from mindspeed_llm.training.setup import build, start_processes

    words = f"--load {toy_llama} --data-path {instructions} --lora-r 4".split()
    plan = resolve(parse("posttrain", words).config, [])
    start_processes(plan)
    model = build(plan)
    optimizer, _ = make_optimizer(plan, model, 10)
    adapters = sum(p.numel() for n, p in model.chunks[0].named_parameters() if "lora_" in n)
    assert sum(b.grad_data.numel() for b in model.wrapped[0].buffers) == pytest.approx(adapters, rel=0.01)
    in_optimizer = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert in_optimizer == adapters
    assert all(not hasattr(p, "main_grad") for n, p in model.chunks[0].named_parameters() if "lora_" not in n)


def test_preprocessing_is_done_once(door, toy_llama, instructions, capsys):
    flags = f"{SFT} --load {toy_llama} --data-path {instructions} --train-iters 1"
    door("posttrain", flags)
    assert "preprocessed to" in capsys.readouterr().out
    door("posttrain", flags)
    assert "preprocessed to" not in capsys.readouterr().out
    door("posttrain", flags.replace("256", "200"))
    assert "preprocessed to" in capsys.readouterr().out


def test_a_loss_curve_and_tensorboard_are_written(door, toy_llama, corpus, tmp_path):
    picture = tmp_path / "curve.png"
    flags = f"{TEXT} --load {toy_llama} --data-path {corpus} --train-iters 2 --loss-curve {picture}"
    result = door("pretrain", flags, f"--tensorboard-dir {tmp_path / 'tb'}")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert json.loads(picture.with_suffix(".json").read_text())["train"] == [list(p) for p in result.history.train]
    assert list((tmp_path / "tb").glob("events*"))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--load /nowhere/model --data-path x", "nothing loadable in /nowhere/model"),
        ("--data-path x --num-layers 2", "--hidden-size is missing"),
        ("--load {toy} --data-path x --num-layers 3", "--num-layers: 3 contradicts .*--truncate-layers"),
        ("--load {toy} --data-path x --tensor-model-parallel-size 3", "num_attention_heads 8 % tensor parallel 3"),
        (
            "--load {toy} --data-path x --global-batch-size 5 --micro-batch-size 2",
            "nearest for .*: 4, 6",
        ),
        ("--load {toy} --data-path x --seq-length 9999", "seq_length 9999 <= max_position_embeddings 256"),
        ("--load {toy} --data-path x --bf16 --fp16", "exclude each other"),
        ("--load {toy} --data-path x --lora-alpha 4", "no meaning without --lora-r"),
        ("--load {toy} --data-path x --lora-target-modules w_proj", "target 'w_proj' matches no linear"),
        ("--load {toy} --data-path x --prompt-type lama2 --dry-run", "prompt-type: 'lama2' is unknown; .* try: llama2"),
        ("--load {toy}", "--data-path is missing"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(door, toy_llama, flags, message):
    with pytest.raises(UserError, match=message):
        door("posttrain", flags.format(toy=toy_llama))


def test_several_problems_come_together(door, toy_llama):
    with pytest.raises(UserError) as refused:
        door("posttrain", f"--load {toy_llama} --lrr 1 --bf16 --fp16 --tensor-model-parallel-size 3 --data-path x")
    text = str(refused.value)
    assert "--lrr is unknown" in text and "exclude each other" in text and "tensor parallel 3" in text


def test_truncated_layers_are_loaded_on_purpose(door, toy_llama, instructions):
    result = door(
        "posttrain", SFT, f"--load {toy_llama} --data-path {instructions} --train-iters 1 --truncate-layers 2"
    )
    assert result.progress.iteration == 1


def test_dry_run_shows_the_plan_and_starts_nothing(door, toy_llama, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    flags = "--tensor-model-parallel-size 2 --lora-r 8 --global-batch-size 16 --micro-batch-size 2 --dry-run"
    assert door("posttrain", f"--load {toy_llama} --data-path nowhere.json {flags}") is None
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "8 = tensor 2 x pipeline 1 x data 4",
        "16 = micro batch 2 x data parallel 4 x 2",
        "rank 8",
        "together",
    ):
        assert part in out


def test_a_nan_stops_the_run_before_the_step(door, toy_llama, corpus, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(toy_llama, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"loss: nan at iteration 1, samples .*; no step was taken"):
        door("pretrain", TEXT, f"--load {broken} --data-path {corpus} --train-iters 1")


@pytest.mark.slow
def test_the_one_command_of_the_readme_needs_no_more_than_data_and_a_model(
    door, toy_llama, instructions, tmp_path, capsys
):
    out = tmp_path / "out"
    result = door("posttrain", f"--stage sft --load {toy_llama} --data-path {instructions} --lora-r 16 --save {out}")
    assert "--prompt-type is not given: using hf" in capsys.readouterr().out
    assert result.progress.consumed_samples == result.progress.iteration > 40
    assert (out / "latest_checkpointed_iteration.txt").read_text() == str(result.progress.iteration)


def test_a_backward_pass_before_the_run_leaves_nothing_in_it(door, corpus, tmp_path):
    """megatron keeps the scale of routers' losses for the whole process, in the shape it had first."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from mindspeed_llm.checkpoint.toy import make_toy

    base = make_toy("mixtral", tmp_path / "base", num_hidden_layers=1)
    once = f"--load {base} --data-path {corpus} --train-iters 2 --moe-aux-loss-coeff 0.1 --eval-iters 0"
    alone = losses(door("pretrain", TEXT, once))
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    output, loss = torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)
    MoEAuxLossAutoScaler.apply(output, loss).sum().backward()
    assert MoEAuxLossAutoScaler.main_loss_backward_scale.shape == ()
    assert losses(door("pretrain", TEXT, once)) == alone
