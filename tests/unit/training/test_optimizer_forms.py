"""Runs of the door whose optimizer state is swapped, split or in bf16: they resume, and say what changes."""

import pytest

from mindspeed_llm.errors import UserError

FLAGS = (
    "--seq-length 32 --lr 5e-3 --lr-decay-style constant --global-batch-size 4 --num-threads 1 --eval-iters 0 --bf16 "
    "--optimizer-selection adamw"
)
O2, SWAP, REUSE = "--o2-optimizer", "--swap-optimizer --swap-optimizer-times 3", "--reuse-fp32-param"


def losses(result):
    return [loss for _, loss in result.history.train]


@pytest.fixture
def run(door, toy_llama, corpus, tmp_path, monkeypatch):
    """run("--flags") -> the training losses; raw data are preprocessed once."""
    monkeypatch.setenv("MINDSPEED_LLM_CACHE", str(corpus.parent / "cache"))

    def train(words):
        return losses(door("pretrain", f"{FLAGS} --data-path {corpus} --tokenizer-name-or-path {toy_llama} {words}"))

    return train


def test_a_run_resumes_to_the_bit_in_any_form(run, toy_llama, tmp_path):
    new = f"--load {toy_llama} --train-iters 4"
    plain = run(new)
    saved = tmp_path / "split"
    assert run(f"{new} {SWAP} {REUSE} --save {saved} --save-interval 2 --async-save") == plain
    resumed = f"--load {saved} --ckpt-step 2"
    assert run(resumed) == plain[2:]  # where the state lies is each start's own affair
    assert run(f"{resumed} {SWAP}") == run(f"{resumed} {REUSE}") == plain[2:]


def test_moments_keep_their_type_unless_it_is_asked_for(run, toy_llama, tmp_path, capsys):
    new = f"--load {toy_llama} --train-iters 5 --save-interval 2 --save"
    narrow, wide = run(f"{new} {tmp_path / 'narrow'} {O2} {SWAP}"), run(f"{new} {tmp_path / 'wide'}")
    resume = f"--ckpt-step 2 --load {tmp_path}"
    assert run(f"{resume}/narrow") == run(f"{resume}/narrow {REUSE}") == narrow[2:] != wide[2:]
    for name, flag in (("narrow", "--no-o2-optimizer"), ("wide", O2)):
        with pytest.raises(UserError, match="resume: --o2-optimizer was .* keep it, or --allow-change o2-optimizer"):
            run(f"{resume}/{name} {flag}")
    capsys.readouterr()
    changed = run(f"{resume}/narrow --no-o2-optimizer --allow-change o2-optimizer")
    assert "moments of AdamW were bf16 and are fp32 from here on" in capsys.readouterr().out
    assert changed[:2] == narrow[2:4] and changed[2] != narrow[4]  # its step comes before rounding
    run(f"{resume}/wide {O2} --allow-change o2-optimizer")
    assert "were fp32 and are rounded to bf16 (--o2-optimizer)" in capsys.readouterr().out


@pytest.mark.slow
def test_training_with_bf16_moments_stays_close(run, toy_llama):
    words = f"--load {toy_llama} --train-iters 30"
    narrow, wide = run(f"{words} {O2}"), run(words)
    assert sum(wide[:5]) / 5 - sum(wide[-5:]) / 5 > 0.3  # it learns
    apart = max(abs(a - b) for a, b in zip(narrow, wide, strict=True))
    assert 0 < apart < 0.05, apart


def test_no_load_optim_begins_with_the_weights(run, toy_llama, tmp_path):
    new = f"--load {toy_llama} --train-iters 4 --save-interval 2 --save {tmp_path / 'out'}"
    run(new)
    resumed = f"--load {tmp_path / 'out'} --ckpt-step 2 --no-load-optim"
    plain = run(resumed)
    assert run(f"{resumed} {SWAP}") == run(f"{resumed} {REUSE}") == plain
