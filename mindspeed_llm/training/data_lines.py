"""What a run says about its data before the first iteration: the sets of a blend, and where a resume goes on."""

from __future__ import annotations

from mindspeed_llm.data.blend import BlendedDataset
from mindspeed_llm.training.data import TrainingData
from mindspeed_llm.training.loop import Progress


def data_lines(data: TrainingData, progress: Progress, train_iters: int) -> list[str]:
    """A table of the sets of a blend, and the position of a run that is resumed."""
    samples = train_iters * data.plan.global_batch_size
    lines = blend_lines(data, progress.consumed_samples, samples)
    return [*lines, position_line(data, progress)] if progress.iteration else lines


def blend_lines(data: TrainingData, consumed_samples: int, samples: int) -> list[str]:
    """A table of the sets of a blend; nothing for a single set.

    Args:
        consumed_samples: before the first iteration of this process.
        samples: of the whole run; the epochs are those from its very beginning to its end.
    """
    blend = data.train.dataset
    if not isinstance(blend, BlendedDataset):
        return []
    shares, lines = blend.shares, [f" data: a blend of {len(blend.members)} sets"]
    lines.append("      share  samples per epoch     epochs of this run  set")
    ends = zip(shares.counts(consumed_samples), shares.counts(samples))
    for number, (member, (before, after)) in enumerate(zip(blend.members, ends)):
        size, share = member.dataset.samples_per_epoch, shares.weights[number] / sum(shares.weights)
        epochs = f"{after / size:.2f}" + (f" ({before / size:.2f} done)" if before else "")
        lines.append(f"   {share:8.3%}  {size:>17,}  {epochs:>21}  {data.prefixes[number]}")
    return lines


def position_line(data: TrainingData, progress: Progress) -> str:
    """Where a resumed run goes on in its data."""
    consumed, left_out = progress.consumed_samples, sum(end - first for first, end in progress.skipped_samples)
    said = f", {left_out} of them left out" if left_out else ""
    following = data.describe(data.sample_indices(consumed)[0])
    epochs = consumed / data.samples_per_epoch
    return f" data: {consumed} samples ({epochs:.2f} epochs) are consumed{said}; next comes {following}"
