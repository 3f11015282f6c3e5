"""Toy checkpoints, loaded here and in transformers, once for all tests of generation."""

import pytest
import torch

from mindspeed_llm.checkpoint.toy import make_toy

torch.set_num_threads(1)
FAMILIES = ("llama", "qwen3", "deepseek_v3")


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """family -> HF directory."""
    root = tmp_path_factory.mktemp("toys")
    return {family: make_toy(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def load(toys):
    """load(family, **arguments of load_model), each combination once."""
    import mindspeed_llm

    loaded = {}

    def get(family, **arguments):
        key = (family, *sorted(arguments.items()))
        if key not in loaded:
            loaded[key] = mindspeed_llm.load_model(toys[family], **arguments)
        return loaded[key]

    return get


@pytest.fixture(scope="session")
def reference(toys):
    """reference(family): the transformers model, fp32, in eval mode."""
    from transformers import AutoModelForCausalLM

    models = {f: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for f, path in toys.items()}
    return models.__getitem__
