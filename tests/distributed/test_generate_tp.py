"""Two tensor-parallel ranks give the answers of one, with adapters too, and refuse layouts they cannot use."""

import os
from unittest import mock

import pytest

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.pool import pool

pytestmark = pytest.mark.fast
PROMPTS = ["The quick brown fox", "a", "def f(x):\n    return"]
WAYS = [
    {},
    dict(do_sample=True, temperature=1.5),
    dict(num_beams=3),
    dict(num_beams=2, do_sample=True),
    dict(use_kv_cache=False),
]


def answers(path, tensor_parallel, adapters):
    """Answers of every way of decoding on this rank."""
    import torch

    from mindspeed_llm import api
    from mindspeed_llm.config.run import RunConfig
    from mindspeed_llm.inference.settings import GenerationSettings
    from mindspeed_llm.lora.inject import inject_adapters
    from mindspeed_llm.plan.adapters import AdapterSettings
    from mindspeed_llm.plan.plan import resolve

    config = RunConfig("inference")
    config.set("load", path)
    config.set("num_threads", 1)
    config.set("tensor_model_parallel_size", tensor_parallel)
    with mock.patch.dict(os.environ, WORLD_SIZE=str(tensor_parallel)):
        plan = resolve(config, [])
    loaded = api.model_from_plan(plan)
    if adapters:
        targets = {"linear_qkv": ("q_proj", "v_proj"), "linear_fc2": ()}
        inject_adapters(loaded.model, AdapterSettings(4, 8.0, 0.0, targets), seed=3)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in sorted(loaded.model.named_parameters()):
            # Only B of the row linear is whole on every rank; the others keep what the seed gave them.
            if "linear_fc2.lora_B" in name:
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        loaded.model.eval()
    ids = [loaded.encode(prompt) for prompt in PROMPTS]
    return [loaded.answer(ids, GenerationSettings(max_new_tokens=12, **way), 3) for way in WAYS]


@pytest.mark.parametrize("adapters", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_ranks_answer_as_one(tmp_path, adapters):
    path = str(make_toy("qwen3", tmp_path))
    [alone] = pool(1).run(answers, path, 1, adapters)
    first, second = pool(2).run(answers, path, 2, adapters)
    assert first == second == alone
    assert alone[0] == alone[-1] != alone[1]


@pytest.mark.slow
def test_adapters_change_the_answers(tmp_path):
    path = str(make_toy("qwen3", tmp_path))
    [plain], [adapted] = pool(1).run(answers, path, 1, False), pool(1).run(answers, path, 1, True)
    assert plain[0] != adapted[0]
