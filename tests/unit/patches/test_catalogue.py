"""The patches of megatron-core: they fit the installed version, do what they say and can be undone."""

import pytest

from mindspeed_llm import accelerator, patches, patching
from mindspeed_llm.accelerator import torch_facade
from mindspeed_llm.patches import catalogue
from mindspeed_llm.patching.patch import check_fingerprint, locate
from mindspeed_llm.patching.registry import installed_version


@pytest.fixture
def megatron_adaptor():
    """The adaptor with everything undone: its import patches, so no test module imports it at the top."""
    from mindspeed_llm import megatron_adaptor

    megatron_adaptor.unpatch()
    yield megatron_adaptor
    # As the rest of the suite has it: the doors' facade, without stand-ins.
    megatron_adaptor.unpatch()
    torch_facade.install(accelerator.current())
    patches.apply()


@pytest.mark.parametrize("patch", [patch for patch in catalogue() if not patch.needs], ids=lambda patch: patch.name)
def test_the_target_exists_with_the_source_it_was_written_against(megatron_adaptor, patch):
    check_fingerprint(patch, locate(patch).value, installed_version(patch.module_name))
    assert installed_version(patch.module_name) in patch.fingerprints
    assert set(patch.fingerprints) <= {"0.15.3", "0.16.1"}
    assert len(patch.why.split()) > 5


def test_without_transformer_engine_its_version_is_simply_too_old(megatron_adaptor):
    from megatron.core import utils
    from megatron.core.optimizer import optimizer_config

    with pytest.raises(TypeError):
        utils.is_te_min_version("1.0")
    megatron_adaptor.patch()
    assert utils.is_te_min_version("3.0") is False and optimizer_config.is_te_min_version("3.0") is False


def test_without_stand_in_its_version_is_too_old_as_well(megatron_adaptor):
    from megatron.core import utils

    torch_facade.install(accelerator.current())
    patches.apply()
    assert utils.is_te_min_version("1.0") is False


def test_patching_twice_adds_nothing_and_unpatching_restores(megatron_adaptor):
    import megatron.core.utils
    import torch

    original, method = megatron.core.utils.is_te_min_version, torch.nn.Module.cuda
    first = megatron_adaptor.patch()
    assert first == [patch.name for patch in catalogue() if patch.condition is None and patch.is_installed()]
    assert megatron_adaptor.patch() == []
    megatron_adaptor.unpatch()
    assert megatron.core.utils.is_te_min_version is original and torch.nn.Module.cuda is method
    assert megatron.core.utils.torch is torch and patching.applied() == []


def foreign_model(**options):
    """A model somebody else's program builds from megatron's local specification."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mindspeed_llm.parallel.setup import initialize_distributed

    initialize_distributed()
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **options,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(config, spec, 96, 64, position_embedding_type="rope", share_embeddings_and_output_weights=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"apply_query_key_layer_scaling": True}, {"softmax_type": "learnable"}])
def test_a_foreign_local_model_computes_the_same_with_and_without_the_patches(megatron_adaptor, options):
    import torch

    torch.set_num_threads(1)
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    torch_facade.install(accelerator.current())
    plain = foreign_model(**options)
    expected = plain(ids, torch.arange(12)[None], None)
    megatron_adaptor.patch()
    ours = foreign_model(**options)
    ours.load_state_dict(plain.state_dict())
    for model in (ours, plain):  # attention is patched in both; the norms of `plain` are torch's
        torch.testing.assert_close(model(ids, torch.arange(12)[None], None), expected, rtol=1e-5, atol=1e-5)
    mask = torch.zeros(1, 1, 12, 12, dtype=torch.bool)  # sees everything: not causal, so megatron's own path
    assert not torch.allclose(ours(ids, torch.arange(12)[None], mask), expected, atol=1e-3)


def test_a_foreign_local_model_takes_packed_documents(megatron_adaptor):
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    megatron_adaptor.patch()
    model = foreign_model()
    ids = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(1))
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=7, max_seqlen_kv=7
    )
    together = model(ids, torch.arange(12)[None], None, packed_seq_params=packed)
    second = model(ids[:, 5:], torch.arange(7)[None], None)
    torch.testing.assert_close(together[:, 5:], second, rtol=1e-5, atol=1e-5)


def test_packed_documents_may_be_padded(megatron_adaptor):
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    megatron_adaptor.patch()
    model = foreign_model()
    ids = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(1))
    lengths, starts = (torch.tensor(bounds, dtype=torch.int32) for bounds in ([0, 5, 11], [0, 6, 12]))
    packed = PackedSeqParams("thd", lengths, lengths, starts, starts, 6, 6)
    together = model(ids, torch.arange(12)[None], None, packed_seq_params=packed)
    for rows in (slice(0, 5), slice(6, 12)):
        alone = model(ids[:, rows], torch.arange(rows.stop - rows.start)[None], None)
        torch.testing.assert_close(together[:, rows], alone, rtol=1e-5, atol=1e-5)
