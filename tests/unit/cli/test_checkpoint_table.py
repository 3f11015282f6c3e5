"""`checkpoint list` of what the converter and what other programs write."""

import torch

from mindspeed_llm.__main__ import main
from mindspeed_llm.checkpoint.convert import convert


def test_a_converted_checkpoint_is_listed_with_its_layout(toy_llama, tmp_path, capsys):
    convert(toy_llama, tmp_path / "mg", tp=2, pp=2, quiet=True)
    assert main(["checkpoint", "list", str(tmp_path / "mg")]) == 0
    said = capsys.readouterr().out
    assert "->  1" in said and "complete" in said and "tensor=2 pipeline=2" in said


def test_another_programs_checkpoint_is_called_foreign(tmp_path, capsys):
    rank = tmp_path / "iter_0000007" / "mp_rank_00"
    rank.mkdir(parents=True)
    torch.save({"model": {}}, rank / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    assert "->  7" in (said := capsys.readouterr().out) and "foreign" in said
