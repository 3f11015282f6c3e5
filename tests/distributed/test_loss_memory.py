"""Logits of labelled tokens alone are computed, a chunk at a time, whatever the layout; all of them never exist."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_llm.checkpoint.toy import VOCAB_SIZE, make_toy
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.layouts import padded_vocab_size
from mindspeed_llm.models.prediction_targets import further_targets
from mindspeed_llm.testing.layouts import compare, make_rows, train
from mindspeed_llm.testing.pool import pool

CHUNK = 5
CHUNKED = f"--loss-compute-mode chunk --loss-chunk-size {CHUNK}"
CASES = {
    "fine-tuning": (1, "llama", "posttrain", ""),
    "padded rows": (1, "llama", "posttrain", "--no-padding-free --micro-batch-size 4"),
    "pre-training": (1, "llama", "pretrain", "--seq-length 24"),
    "adapters": (1, "llama", "posttrain", "--lora-r 4 --lora-target-modules all-linear"),
    "tensor": (2, "llama", "posttrain", "--tensor-model-parallel-size 2"),
    "tensor and sequence": (2, "llama", "posttrain", "--tensor-model-parallel-size 2 --sequence-parallel"),
    "context": (2, "llama", "posttrain", "--context-parallel-size 2"),
    "last stage": (2, "llama", "posttrain", "--pipeline-model-parallel-size 2"),
    "prediction layers": (1, "predicting", "posttrain", ""),
    "prediction layers, tensor": (2, "predicting", "posttrain", "--tensor-model-parallel-size 2 --sequence-parallel"),
}


@pytest.fixture(scope="module")
def toys(toy_llama, tmp_path_factory):
    """A Llama, and a model with a prediction layer."""
    directory = tmp_path_factory.mktemp("loss") / "predicting"
    sizes = dict(num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=1)
    return {"llama": str(toy_llama), "predicting": str(make_toy("deepseek_v3", directory, **sizes))}


class LogitsSeen(TorchDispatchMode):
    """Whatever is made with a vocabulary as its last dimension: how many rows at most, and rows of products."""

    def __init__(self, widths):
        super().__init__()
        self.widths, self.most, self.multiplied = widths, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in () if function.is_view else out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] in self.widths:
                rows = tensor.numel() // tensor.shape[-1]
                self.most = max(self.most, rows)
                if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                    self.multiplied += rows
        return out


def train_watched(*arguments):
    """`train`, the rows of logits that existed at once, and those that were computed, as they are on this rank."""
    tp = 2 if "--tensor-model" in arguments[1] else 1
    padded = padded_vocab_size(VOCAB_SIZE, tp, 1) // tp
    own = min(padded, VOCAB_SIZE - (dist.get_rank() % tp) * padded)
    with LogitsSeen({padded, own, VOCAB_SIZE}) as seen:
        found = train(*arguments)
    return found, seen.most, seen.multiplied


def labelled(rows, layers):
    """Targets of the model and of its prediction layers in all rows."""
    count = 0
    for row in rows:
        labels = torch.as_tensor(row["labels"])[None]
        further = further_targets(torch.as_tensor(row["input_ids"])[None], labels, None, layers)
        count += sum(int((targets != -100).sum()) for targets in (labels, *(targets for _, targets in further)))
    return count


@pytest.mark.parametrize("case", CASES)
def test_only_a_chunk_of_labelled_tokens_has_logits(toys, case):
    processes, toy, door, flags = CASES[case]
    rows = make_rows(4, equal=door == "pretrain")
    arguments = (toys[toy], f"{flags} {CHUNKED}", rows, 1, "sgd", 0.1, door)
    found = pool(processes).run(train_watched, *arguments)
    assert max(most for _, most, _ in found) == CHUNK
    copies = 2 if "--tensor-model" in flags else 1
    assert sum(multiplied for *_, multiplied in found) == copies * labelled(rows, int(toy == "predicting"))
    plain = pool(processes).run(train, toys[toy], flags, rows, 1, "sgd", 0.1, door)[0]
    difference = compare(found[0][0], plain)
    assert difference.loss < 1e-6 and difference.gradient < 1e-6, str(difference)


def test_all_logits_would_be_noticed(toys):
    rows = make_rows(4)
    flags = "--no-cross-entropy-loss-fusion --micro-batch-size 4"
    _, most, multiplied = pool(1).run(train_watched, toys["llama"], flags, rows, 1)[0]
    everything = sum(len(row["labels"]) for row in rows)
    assert most >= everything > CHUNK and multiplied >= everything > labelled(rows, 0)


def test_chunk_means_1024_labelled_tokens(toys):
    from mindspeed_llm.config.operators import OperatorConfig, loss_chunk_rows

    assert loss_chunk_rows(OperatorConfig()) is None
    assert loss_chunk_rows(OperatorConfig(loss_compute_mode="chunk")) == 1024
    assert loss_chunk_rows(OperatorConfig(loss_compute_mode="chunk", loss_chunk_size=7)) == 7


def test_chunks_of_a_loss_that_holds_all_logits_are_refused(toys):
    flags = "--loss-compute-mode chunk --no-cross-entropy-loss-fusion"
    with pytest.raises(UserError, match="--loss-compute-mode chunk has no meaning with --no-cross-entropy-loss-fusion"):
        pool(1).run(train, toys["llama"], flags, make_rows(4), 1)
