"""Is the tuned model clearly better? The two conditions that decide quickstart.sh's exit status."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SMALLEST_GAIN = 0.25
"""Part of the base's held-out answer loss that must be gone."""

BATCH_SIZE = 32


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        base_loss, tuned_loss: nats per answer token of rows from modules that were never trained on.
        taught: (expected, given) answers to questions of the training data.
    """

    base_loss: float
    tuned_loss: float
    taught: Sequence[tuple[str, str]]

    @property
    def gain(self) -> float:
        """Part of the base's loss that is gone."""
        return 1 - self.tuned_loss / self.base_loss

    @property
    def reproduced(self) -> int:
        """Taught answers that came back word for word."""
        return sum(expected.split() == given.split() for expected, given in self.taught)

    def problems(self) -> list[str]:
        """Why the tuned model is not clearly better; empty when it is."""
        problems = []
        if not self.gain >= SMALLEST_GAIN:
            problems.append(f"held-out answer loss fell by {self.gain:.0%} only, at least {SMALLEST_GAIN:.0%} are due")
        if self.reproduced < len(self.taught) or not self.taught:
            problems.append(f"{self.reproduced} of {len(self.taught)} taught answers came back word for word")
        return problems


def answer_loss(model_directory: Path, data_prefix: Path) -> float:
    """Mean loss over all answer tokens of a preprocessed instruction set, computed by transformers in fp32.

    Args:
        model_directory: Hugging Face directory.
        data_prefix: as written by preprocess_data.py, unpacked; the prompts are in it but not in the loss.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from mindspeed_llm.data.sft_dataset import SFTDataset

    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    dataset = SFTDataset(data_prefix, "1,0,0")
    samples = sorted((dataset.sample(i) for i in range(len(dataset))), key=lambda s: len(s["input_ids"]))
    total, count = 0.0, 0
    for start in range(0, len(samples), BATCH_SIZE):
        batch = samples[start : start + BATCH_SIZE]
        longest = len(batch[-1]["input_ids"])
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full((len(batch), longest), -100)
        for row, sample in enumerate(batch):
            length = len(sample["input_ids"])
            ids[row, :length] = torch.as_tensor(sample["input_ids"])
            labels[row, :length] = torch.as_tensor(sample["labels"])  # shifted: position i predicts token i + 1
        with torch.inference_mode():
            logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        total, count = total + loss.item(), count + int((labels != -100).sum())
    return total / count
