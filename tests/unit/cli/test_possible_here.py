"""What this machine lacks for a job is said by a dry run as by the run, with everything else that is wrong."""

import pytest

from mindspeed_llm.cli.training import run_door
from mindspeed_llm.config.parser import parse
from mindspeed_llm.errors import UserError


@pytest.fixture
def refusal(toy_llama, tmp_path):
    """The refusal of a line that has another mistake too, so that what should be refused is in any case."""

    def get(*words):
        line = f"--load {toy_llama} --data-path {tmp_path}/rows.json --seq-length 64 --no-such-option"
        with pytest.raises(UserError) as refused:
            run_door(parse("pretrain", [*line.split(), *map(str, words)]))
        return str(refused.value)

    return get


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize("inside", ["file", "file/below"])
def test_a_place_that_cannot_be_saved_to(refusal, tmp_path, dry, inside):
    (tmp_path / "file").write_text("")
    said = refusal("--save", tmp_path / inside, *dry)
    assert f"--save: {tmp_path / inside} cannot be written to" in said and len(said.splitlines()) > 1
    assert "cannot be written to" not in refusal("--save", tmp_path / "new" / "one", *dry)
    assert "cannot be written to" not in refusal("--save", tmp_path / inside, "--eval-only", *dry)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_a_device_that_is_not_here(refusal, dry, monkeypatch):
    monkeypatch.setattr("mindspeed_llm.accelerator.npu.NPU.is_available", lambda self: False)
    monkeypatch.setattr("mindspeed_llm.accelerator.npu.NPU.why_unavailable", lambda self: "torch_npu is not installed")
    assert "device: npu is wrong, because torch_npu is not installed; legal: " in refusal("--device", "npu", *dry)
    assert "device: " not in refusal("--device", "cpu", *dry)
