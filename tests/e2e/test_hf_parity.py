"""Twenty steps of fine-tuning follow a transformers (+ peft) loop on the same rows, adapters and optimizer settings."""

import json

import pytest
import torch

from mindspeed_llm.cli.training import run_door
from mindspeed_llm.config.parser import parse

pytestmark = pytest.mark.slow

STEPS, BATCH, LR = 20, 4, 5e-3
OPTIMIZER = dict(lr=LR, betas=(0.9, 0.95), eps=1e-8)
WEIGHT_DECAY = 0.1
FLAGS = (
    f"--stage sft --prompt-type chatml --micro-batch-size 2 --global-batch-size {BATCH} --train-iters {STEPS} "
    f"--lr {LR} --lr-decay-style constant --adam-beta2 0.95 --weight-decay {WEIGHT_DECAY} --seq-length 256 "
    "--split 1 --progress lines"
).split()
TARGETS = {
    "fused": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(),
    "peft's default": ["q_proj", "v_proj"],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Instructions of very different lengths."""
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    answers = ["yes", "It counts from one to ten, then stops.", "No. " * 12, "Because the file is read twice."]
    rows = [
        {"instruction": f"Question {i}: why does it {word}?", "input": "", "output": answers[i % 4]}
        for i, word in enumerate("start stop wait read write open close fail pass loop end copy move sort".split())
    ]
    path.write_text(json.dumps(rows))
    return path


def ours(hf_dir, rows, tmp_path, *more):
    """Losses of our run."""
    parsed = parse("posttrain", [*FLAGS, "--load", str(hf_dir), "--data-path", str(rows), *more])
    assert parsed.problems == []
    return [loss for _, loss in run_door(parsed).history.train]


def batches(rows, hf_dir):
    """The same global batches: lists of (ids, shifted labels)."""
    from mindspeed_llm.config.data import DataConfig
    from mindspeed_llm.data.cache import preprocess_cached
    from mindspeed_llm.data.samplers import GlobalBatchSampler
    from mindspeed_llm.data.sft_dataset import SFTDataset
    from mindspeed_llm.data.tokenizer import load_tokenizer

    data = DataConfig(data_path=[str(rows)], prompt_type="chatml", seq_length=256)
    dataset = SFTDataset(preprocess_cached(data, load_tokenizer(str(hf_dir))), "1", "train")
    sampler = GlobalBatchSampler(len(dataset), BATCH, 1234)
    for step in range(STEPS):
        samples = [dataset.sample(i) for i in sampler.indices(step)]
        yield [(torch.tensor(s["input_ids"]), torch.tensor(s["labels"])) for s in samples]


def theirs(model, rows, hf_dir, shift=0):
    """Losses of a plain loop: one document at a time, mean over the trained tokens of the batch."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **OPTIMIZER)
    losses = []
    for batch in batches(rows, hf_dir):
        total = sum(int((labels != -100).sum()) for _, labels in batch)
        loss = 0.0
        for ids, labels in batch:
            logits = model(input_ids=ids[None]).logits[0]
            loss = loss + torch.nn.functional.cross_entropy(
                logits, labels.roll(shift), ignore_index=-100, reduction="sum"
            )
        (loss / total).backward()
        torch.nn.utils.clip_grad_norm_([*decayed, *plain], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()) / total)
    return losses


def hf_model(hf_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)


@pytest.mark.parametrize("family", ["toy_llama", "toy_qwen"])
def test_full_fine_tuning(family, rows, tmp_path, request):
    hf_dir = request.getfixturevalue(family)
    found = ours(hf_dir, rows, tmp_path)
    expected = theirs(hf_model(hf_dir), rows, hf_dir)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[-1] < 0.5 * found[0]


@pytest.mark.parametrize("targets", TARGETS)
def test_lora(targets, toy_llama, rows, tmp_path):
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[targets], task_type="CAUSAL_LM")
    model = peft.get_peft_model(hf_model(toy_llama), config)
    model.save_pretrained(tmp_path / "peft")
    found = ours(toy_llama, rows, tmp_path, "--lora-load", str(tmp_path / "peft"))
    assert found == pytest.approx(theirs(model, rows, toy_llama), rel=1e-4)
    assert found[-1] < 0.9 * found[0]


def test_the_comparison_notices_shifted_labels(toy_llama, rows, tmp_path):
    found = ours(toy_llama, rows, tmp_path)
    shifted = theirs(hf_model(toy_llama), rows, toy_llama, shift=1)
    assert found != pytest.approx(shifted, rel=1e-2)
