"""The patches of megatron-core: they fit the installed version, do what they say and can be undone."""

import pytest

from mindspeed_llm import megatron_adaptor, patching
from mindspeed_llm.patches import catalogue
from mindspeed_llm.patching.patch import check_fingerprint, locate
from mindspeed_llm.patching.registry import installed_version


@pytest.fixture
def unpatched():
    megatron_adaptor.unpatch()
    yield
    megatron_adaptor.patch()


@pytest.mark.parametrize("patch", catalogue(), ids=lambda patch: patch.name)
def test_the_target_exists_with_the_source_it_was_written_against(unpatched, patch):
    check_fingerprint(patch, locate(patch).value, installed_version(patch.module_name))
    assert installed_version(patch.module_name) in patch.fingerprints
    assert len(patch.why.split()) > 5


def test_without_transformer_engine_its_version_is_simply_too_old(unpatched):
    from megatron.core import utils
    from megatron.core.optimizer import optimizer_config

    with pytest.raises(TypeError):
        utils.is_te_min_version("1.0")
    megatron_adaptor.patch()
    assert utils.is_te_min_version("1.0") is False and optimizer_config.is_te_min_version("1.0") is False


def test_patching_twice_adds_nothing_and_unpatching_restores(unpatched):
    import megatron.core.utils
    import torch

    original, method = megatron.core.utils.is_te_min_version, torch.nn.Module.cuda
    first = megatron_adaptor.patch()
    assert first == [patch.name for patch in catalogue() if patch.condition is None]
    assert megatron_adaptor.patch() == []
    megatron_adaptor.unpatch()
    assert megatron.core.utils.is_te_min_version is original and torch.nn.Module.cuda is method
    assert megatron.core.utils.torch is torch and patching.applied() == []
