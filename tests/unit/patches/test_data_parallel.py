"""What finalize_model_grads calls on a model that torch's fully_shard cuts, which reduces the gradients itself."""

import inspect

import pytest
from packaging.version import Version

from mindspeed_llm import accelerator, patches, patching
from mindspeed_llm.accelerator import torch_facade
from mindspeed_llm.errors import UserError

NAME = "gradients-of-torch-fsdp2-are-finished"
megatron = pytest.importorskip("megatron.core")
pytestmark = pytest.mark.skipif(
    Version(megatron.__version__) < Version("0.16"), reason="finalize_model_grads passes nothing before 0.16"
)


@pytest.fixture
def chunk():
    """A model of the class whose gradients nobody has to finish, patched."""
    from megatron.core.distributed.torch_fully_sharded_data_parallel import TorchFullyShardedDataParallel

    torch_facade.install(accelerator.current())
    patches.apply()
    yield object.__new__(TorchFullyShardedDataParallel)
    patches.apply()


def test_gradients_are_finished_as_finalize_model_grads_asks(chunk):
    from megatron.core.distributed import finalize_model_grads

    asked = "finish_grad_sync(force_all_reduce=force_all_reduce)"
    assert asked in inspect.getsource(inspect.getmodule(finalize_model_grads)), "the patch is no longer needed"
    assert chunk.finish_grad_sync(force_all_reduce=False) is None
    assert chunk.finish_grad_sync() is None
    patching.undo([NAME])
    with pytest.raises(TypeError, match="force_all_reduce"):
        chunk.finish_grad_sync(force_all_reduce=False)


def test_whole_gradients_on_each_rank_are_refused(chunk):
    with pytest.raises(UserError, match=r"^force_all_reduce: True is wrong, .*--save-wgrads-interval"):
        chunk.finish_grad_sync(force_all_reduce=True)
