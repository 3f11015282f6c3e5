"""A model with experts generates what transformers generates."""

import torch
from transformers import AutoModelForCausalLM

import mindspeed_llm
from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.inference.engine import decode_steps, new_answers
from mindspeed_llm.inference.settings import GenerationSettings

torch.set_num_threads(1)


def test_greedy_tokens_are_those_of_transformers(tmp_path):
    directory = make_toy("mixtral", tmp_path / "toy", num_hidden_layers=2, num_local_experts=4)
    loaded = mindspeed_llm.load_model(directory)
    prompts = [loaded.encode("def f(x):\n    return"), loaded.encode("a")]
    answers = new_answers(loaded.model.config.shape, prompts, GenerationSettings(max_new_tokens=12))
    for _ in decode_steps(loaded.model, answers, GenerationSettings(max_new_tokens=12)):
        pass
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for prompt, answer in zip(prompts, answers):
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
        assert answer.tokens == expected.tolist()[: len(answer.tokens)] and answer.tokens
