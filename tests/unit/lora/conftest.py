"""Adapters that a few steps of tuning moved away from zero, made once through the posttrain door."""

import json
from pathlib import Path

import pytest
import torch

TARGETS = {
    "fused": "linear_qkv linear_proj linear_fc1 linear_fc2",
    "parts": "q_proj v_proj o_proj up_proj down_proj",
}
RUN = (
    "--stage sft --prompt-type chatml --seq-length 128 --lr 2e-2 --lr-decay-style constant --global-batch-size 4 "
    "--micro-batch-size 2 --split 1 --train-iters 3 --lora-r 4 --lora-alpha 12 --progress lines --num-threads 1"
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Instructions of uneven length."""
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    rows = [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(1, n + 1)))}
        for n in range(2, 18)
    ]
    path.write_text(json.dumps(rows))
    return path


def _post_train(*words) -> None:
    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse

    run_door(parse("posttrain", [piece for word in words for piece in str(word).split()]))


@pytest.fixture(scope="session")
def post_train():
    """post_train("--flag value ...", ...) runs the door; problems raise UserError as they would be printed."""
    return _post_train


@pytest.fixture(scope="session")
def tuned(request, rows, tmp_path_factory):
    """tuned(family, targets) -> (base HF directory, adapter checkpoint)."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(family, targets):
        if (family, targets) not in made:
            base, out = request.getfixturevalue(family), tmp_path_factory.mktemp("tuned") / "out"
            flags = f"--load {base} --data-path {rows} --save {out} --lora-target-modules {TARGETS[targets]}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MINDSPEED_LLM_CACHE", str(out.parent / "cache"))
                _post_train(RUN, flags)
            made[family, targets] = (base, out)
        return made[family, targets]

    return make


@pytest.fixture(scope="session")
def convert_door():
    """convert_door("--flag value ...", ...) runs the door; problems raise UserError as they would be printed."""
    from mindspeed_llm.cli.convert import run
    from mindspeed_llm.config.parser import parse

    return lambda *words: run(parse("convert", [piece for word in words for piece in str(word).split()]))


@pytest.fixture(scope="session")
def tokens():
    """Two rows of random tokens [2, 24]."""
    return torch.randint(0, 997, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def our_logits(tokens):
    """our_logits(base, lora, merge) -> fp32 logits [b, s, v] of a model of ours."""
    from mindspeed_llm import load_model

    @torch.no_grad()
    def logits(base, lora=None, merge=False):
        return load_model(base, lora, merge=merge, dtype="fp32", device="cpu").model(tokens, gather_logits=True)

    return logits


@pytest.fixture(scope="session")
def hf_logits(tokens):
    """hf_logits(directory, adapter) -> fp32 logits [b, s, v] of transformers, with PEFT's adapters on top."""
    from transformers import AutoModelForCausalLM

    @torch.no_grad()
    def logits(directory, adapter=None):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        return model.eval()(input_ids=tokens).logits

    return logits
