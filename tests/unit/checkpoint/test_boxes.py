"""Boxes cover what they should, their bytes are what torch.load expects, and damage to any of it is noticed."""

import io
import itertools
import pickle
import random

import pytest
import torch

from mindspeed_llm.checkpoint import write_part as writing
from mindspeed_llm.checkpoint.box_frame import frame
from mindspeed_llm.checkpoint.boxes import Box, cut, not_a_partition, split_boxes
from mindspeed_llm.checkpoint.stored_boxes import StoredBoxes
from mindspeed_llm.checkpoint.write_part import as_bytes, bytes_of_part, merge_parts, saved_bytes, write_part
from mindspeed_llm.errors import UserError

# (shape, dimension that is cut into halves as a gated fc1 is)
ARRAYS = [((5,), None), ((4, 6), None), ((3, 4, 5), None), ((4, 6), 0), ((4, 6), 1), ((3, 2, 6), 2), ((1, 1, 7), None)]


@pytest.mark.parametrize("shape, halved", ARRAYS)
def test_every_slice_of_memory_is_cut_into_few_boxes(shape, halved):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for view in [whole] if halved is None else whole.chunk(2, dim=halved):
        for start, stop in itertools.combinations(range(whole.numel() + 1), 2):
            boxes = list(cut(view.shape, view.stride(), view.storage_offset(), start, stop))
            values = []
            for offsets, size, first in boxes:
                box = view[tuple(slice(at, at + n) for at, n in zip(offsets, size))]
                held = whole.view(-1)[start:stop]
                assert torch.equal(held.as_strided(size, view.stride(), held.storage_offset() + first - start), box)
                values += box.flatten().tolist()
            assert sorted(values) == [v for v in view.flatten().tolist() if start <= v < stop]
            assert len(boxes) <= 2 * len(shape) - 1


def test_a_partition_is_told_from_what_is_none():
    rows = [((0, 0), (2, 5)), ((2, 0), (2, 5))]
    assert not_a_partition((4, 5), rows) is None
    assert "5 of 20 values are missing" in not_a_partition((4, 5), [((0, 0), (2, 5)), ((2, 0), (1, 5))])
    assert "overlap" in not_a_partition((4, 5), [((0, 0), (2, 5)), ((1, 0), (2, 5))] + [((3, 0), (1, 5))])
    assert "leaves the tensor" in not_a_partition((4, 5), [rows[0], ((3, 0), (2, 5))])
    # as many values as there should be: one row twice, one never
    assert "overlap" in not_a_partition((4, 5), [rows[0], ((1, 0), (2, 5))])
    assert not_a_partition((), [((), ())]) is None


def test_random_partitions_are_accepted_and_any_shifted_box_is_not():
    random.seed(3)
    for _ in range(50):
        columns = sorted(random.sample(range(1, 9), 2))
        boxes = []
        for left, right in itertools.pairwise([0, *columns, 9]):
            middle = random.randint(1, 5)
            boxes += [((0, left), (middle, right - left)), ((middle, left), (6 - middle, right - left))]
        assert not_a_partition((6, 9), boxes) is None
        number, axis = random.randrange(len(boxes)), random.randrange(2)
        (at, shape) = boxes[number]
        boxes[number] = (tuple(a + (d == axis) for d, a in enumerate(at)), shape)
        assert not_a_partition((6, 9), boxes) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (3,), (0, 5), (1, 3, 4), (700, 3)])
def test_torch_loads_a_framed_tensor(dtype, shape):
    tensor = (torch.randn(shape) * 3).to(dtype)
    around = frame(dtype, shape)
    content = around.head + (as_bytes(tensor) if tensor.numel() else b"") + around.tail
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    assert loaded.dtype == dtype and loaded.shape == tensor.shape and torch.equal(loaded, tensor)
    assert len(content) == around.length and len(around.head) % 64 == 0


def test_large_boxes_are_split_and_stay_a_partition():
    box = Box("w", (3, 40, 7), (1, 0, 0), torch.randn(2, 40, 7))
    pieces = list(split_boxes(box, 800))
    assert len(pieces) > 2 and all(piece.nbytes <= 800 for piece in pieces)
    whole = [(p.offsets, p.shape) for p in pieces] + [((0, 0, 0), (1, 40, 7))]
    assert not_a_partition((3, 40, 7), whole) is None
    again = torch.zeros(3, 40, 7)
    for piece in pieces:
        again[tuple(slice(at, at + n) for at, n in zip(piece.offsets, piece.shape))] = piece.tensor
    assert torch.equal(again[1:], box.tensor)


WEIGHT, COLUMNS, STEP = torch.randn(6, 10), torch.randn(4, 8).bfloat16(), torch.tensor(7)


def parts():
    """What two ranks hold of three tensors: slices of one, columns of another (not contiguous), all of the third."""
    first = [Box("w", (6, 10), (0, 0), WEIGHT[:3]), Box("w", (6, 10), (3, 0), WEIGHT[3:4, :4])]
    second = [Box("w", (6, 10), (3, 4), WEIGHT[3:4, 4:]), Box("w", (6, 10), (4, 0), WEIGHT[4:])]
    for rank, boxes in enumerate((first, second)):
        boxes.append(Box("c", (4, 8), (0, 4 * rank), COLUMNS[:, 4 * rank : 4 * rank + 4]))
    return [[*first, Box("s", (), (), STEP)], second]


def save(directory, parts, merge=lambda facts: {"step": max(f["step"] for f in facts)}):
    """Both ranks' parts, merged."""
    directory.mkdir(exist_ok=True)
    for rank, boxes in enumerate(parts):
        write_part(directory, rank, boxes, {f"rng/shard_{rank}_2": saved_bytes([{"seed": rank}])}, {"step": rank})
    return merge_parts(directory, range(len(parts)), {"lr": 0.5}, merge)


@pytest.fixture
def saved(tmp_path):
    save(tmp_path / "saved", parts())
    return tmp_path / "saved"


def test_what_ranks_wrote_is_read_in_any_cut(saved):
    stored = StoredBoxes(saved)
    wanted = [
        Box("w", (6, 10), (0, 0), torch.empty(6, 10)),
        Box("w", (6, 10), (2, 3), torch.empty(3, 4)),
        Box("w", (6, 10), (0, 9), torch.empty(1, 6, dtype=torch.float64).t()),
        Box("c", (4, 8), (1, 2), torch.empty(2, 5, dtype=torch.bfloat16)),
        Box("s", (), (), torch.tensor(0)),
        Box("w", (9, 10), (5, 0), torch.full((4, 10), 8.0), flexible=True),
    ]
    stored.fill(wanted)
    assert torch.equal(wanted[0].tensor, WEIGHT) and torch.equal(wanted[1].tensor, WEIGHT[2:5, 3:7])
    assert torch.equal(wanted[2].tensor.float(), WEIGHT[:, 9:]) and torch.equal(wanted[3].tensor, COLUMNS[1:3, 2:7])
    assert wanted[4].tensor == 7
    assert torch.equal(wanted[5].tensor[:1], WEIGHT[5:]) and not wanted[5].tensor[1:].any()
    assert stored.read_common() == {"lr": 0.5, "step": 1}
    assert stored.read_object("rng/shard_1_2") == {"seed": 1}


def test_sizes_and_sums_are_those_of_the_files(tmp_path):
    from mindspeed_llm.checkpoint.checksum import file_sum

    sums = save(tmp_path / "saved", parts())
    assert set(sums) == {path.name for path in (tmp_path / "saved").iterdir()}
    assert all(file_sum(tmp_path / "saved" / name) == expected for name, expected in sums.items())
    objects = {"rng/shard_0_2": saved_bytes([{"seed": 0}])}
    assert bytes_of_part(parts()[0], objects) == sums["__0_0.distcp"].size


def test_a_box_read_in_blocks_is_the_same(saved, monkeypatch):
    monkeypatch.setattr("mindspeed_llm.checkpoint.stored_boxes._BLOCK_BYTES", 16)
    target = torch.empty(4, 5, dtype=torch.float32)
    assert StoredBoxes(saved).read("c", (0, 2), target) == 20
    assert torch.equal(target, COLUMNS[:, 2:7].float())


def test_large_parts_are_written_into_two_files(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_WORTH_A_FILE", 50)
    monkeypatch.setattr(writing, "MAX_BOX_BYTES", 60)
    sums = save(tmp_path / "saved", parts())
    assert {f"__{rank}_{number}.distcp" for rank in (0, 1) for number in (0, 1)} <= set(sums)
    target = torch.empty(6, 10)
    StoredBoxes(tmp_path / "saved").fill([Box("w", (6, 10), (0, 0), target)])
    assert torch.equal(target, WEIGHT)


def test_a_dropped_box_is_noticed(tmp_path):
    first, second = parts()
    with pytest.raises(UserError, match="is incomplete, because of w 6 of 60 values are missing"):
        save(tmp_path / "saved", [first, second[1:]])


def test_a_shifted_box_is_noticed(tmp_path):
    first, second = parts()
    second[0] = Box("w", (6, 10), (3, 3), second[0].tensor)
    with pytest.raises(UserError, match="overlap"):
        save(tmp_path / "saved", [first, second])


def test_ranks_that_disagree_are_noticed(tmp_path):
    first, second = parts()
    first[0] = Box("w", (7, 10), (0, 0), WEIGHT[:3])
    with pytest.raises(UserError, match="ranks disagree about w"):
        save(tmp_path / "saved", [first, second])


def test_of_two_ranks_with_the_same_box_one_counts(tmp_path):
    first, second = parts()
    save(tmp_path / "saved", [first + second, second])
    target = torch.empty(6, 10)
    StoredBoxes(tmp_path / "saved").fill([Box("w", (6, 10), (0, 0), target)])
    assert torch.equal(target, WEIGHT)


def test_who_waits_for_a_part_hears_of_its_failure(tmp_path):
    write_part(tmp_path, 0, [], {}, {})
    writing.report_failure(tmp_path, 1, "No space left on device")
    with pytest.raises(UserError, match="because rank 1 failed: No space left on device"):
        writing.wait_for_parts(tmp_path, [0, 1], 5)
    with pytest.raises(UserError, match=r"nothing came from ranks \[2\]"):
        writing.wait_for_parts(tmp_path, [0, 2], 0.1)


def test_what_does_not_fit_is_refused_by_name(saved):
    stored, empty = StoredBoxes(saved), torch.empty(6, 10)
    with pytest.raises(UserError, match=r"w has shape \[6, 10\] instead of \[6, 11\]; missing.w is missing"):
        stored.fill([Box("w", (6, 11), (0, 0), empty), Box("missing.w", (6, 10), (0, 0), empty)])
    with pytest.raises(UserError, match="holds no rng/shard_5_6"):
        stored.read_object("rng/shard_5_6")


@pytest.mark.parametrize("name", ["__1_0.distcp", "common.pt", ".metadata"])
def test_a_truncated_file_is_refused_by_name(saved, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 3])
    with pytest.raises(UserError, match=name):
        stored = StoredBoxes(saved)
        stored.read_common()
        stored.fill([Box("w", (6, 10), (0, 0), torch.empty(6, 10))])


class Attack:
    """Unpickling it makes an object of a class that no checkpoint needs."""

    def __reduce__(self):
        return random.Random, (0,)


def test_objects_that_run_code_are_refused_unless_trusted(tmp_path):
    write_part(tmp_path, 0, [], {"rng/shard_0_1": saved_bytes([Attack()])}, {})
    merge_parts(tmp_path, [0], {"attack": Attack()}, lambda facts: {})
    for read in (lambda s: s.read_common(), lambda s: s.read_object("rng/shard_0_1")):
        with pytest.raises(
            UserError, match=r"is refused, because loading it may run code.*try: --trust-checkpoint"
        ) as no:
            read(StoredBoxes(tmp_path))
        assert "\n" not in str(no.value)
        read(StoredBoxes(tmp_path, trusted=True))


def test_an_index_that_runs_code_is_refused(saved):
    (saved / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError, match="random.Random is not part of checkpoint metadata"):
        StoredBoxes(saved)
