"""Packages that may be there or not, as files: small ones whose import does what the real one's does on a CPU.

Name of a state -> {path: content}. A folder NAME-VERSION.dist-info makes a package known to importlib.metadata.
"""

from __future__ import annotations


def _known(name: str, version: str, entry_points: str = "") -> dict[str, str]:
    folder = f"{name}-{version}.dist-info"
    files = {f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}
    return {**files, f"{folder}/entry_points.txt": entry_points} if entry_points else files


# NVIDIA's Apex built with its extensions: it loads anywhere, and computes on CUDA alone.
APEX = {
    **_known("apex", "0.1"),
    "apex/__init__.py": "from apex import multi_tensor_apply, normalization, optimizers\n",
    "apex/multi_tensor_apply.py": """
import amp_C

class MultiTensorApply:
    available = True

    def __init__(self, chunk_size):
        self.chunk_size = chunk_size

    def __call__(self, op, noop_flag_buffer, tensor_lists, *args):
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)

multi_tensor_applier = MultiTensorApply(2048 * 32)
""",
    "apex/optimizers/__init__.py": """
import torch
import amp_C

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                                      weight_decay=weight_decay))
        self._dummy_overflow_buf = torch.cuda.IntTensor([0])

class FusedSGD(FusedAdam):
    pass
""",
    "apex/normalization/__init__.py": """
import torch

class FusedLayerNorm(torch.nn.Module):
    def __init__(self, *args, **kwargs):
        import fused_layer_norm_cuda

class FusedRMSNorm(FusedLayerNorm):
    pass
""",
    "apex/normalization/fused_layer_norm.py": """
def fused_layer_norm_affine(*args, **kwargs):
    import fused_layer_norm_cuda

class FusedLayerNormAffineFunction:
    apply = fused_layer_norm_affine
""",
    "apex/contrib/__init__.py": "",
    "apex/contrib/layer_norm/__init__.py": "",
    "apex/contrib/layer_norm/layer_norm.py": "import fast_layer_norm\n",
    "apex/transformer/__init__.py": "",
    "apex/transformer/functional/__init__.py": """
def fused_apply_rotary_pos_emb(*args, **kwargs):
    raise RuntimeError("fused_rotary_positional_embedding: tensors must be on CUDA")

fused_apply_rotary_pos_emb_thd = fused_apply_rotary_pos_emb
""",
    "amp_C.py": """
import torch

def _on_cuda(chunk_size, noop_flag, tensor_lists, *args):
    raise RuntimeError("Expected object of device type cuda but got device type cpu")

multi_tensor_scale = multi_tensor_l2norm = multi_tensor_adam = multi_tensor_axpby = _on_cuda
""",
    "fused_layer_norm_cuda.py": "raise ImportError('libcudart.so.12: cannot open shared object file')\n",
    "fast_layer_norm.py": "raise ImportError('libcudart.so.12: cannot open shared object file')\n",
    "fused_weight_gradient_mlp_cuda.py": """
def wgrad_gemm_accum_fp32(*args):
    raise RuntimeError("CUDA error: no CUDA-capable device is detected")

wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
""",
}

# The index's package of that name: sessions for the Pyramid web framework, older than today's Pyramid.
ANOTHER_APEX = {
    **_known("apex", "0.9.10.dev0"),
    "apex/__init__.py": "from pyramid.session import UnencryptedCookieSessionFactoryConfig\n",
    "pyramid/__init__.py": "",
    "pyramid/session.py": "",
}

# Transformer Engine whose libraries load: what it computes needs CUDA.
TRANSFORMER_ENGINE = {
    **_known("transformer_engine", "2.8.0"),
    "transformer_engine/__init__.py": "from importlib import metadata\nfrom . import common, pytorch\n"
    "__version__ = str(metadata.version('transformer_engine'))\n",
    "transformer_engine/common/__init__.py": "",
    "transformer_engine/common/recipe.py": """
class Recipe:
    pass

class DelayedScaling(Recipe):
    def __init__(self, *args, **kwargs):
        pass

class Format:
    E4M3 = HYBRID = None

class _FormatHelper:
    pass

class Float8CurrentScaling(DelayedScaling):
    pass

class Float8BlockScaling(DelayedScaling):
    pass

class MXFP8BlockScaling(DelayedScaling):
    pass
""",
    "transformer_engine/pytorch/__init__.py": """
import torch

class _OnCuda(torch.nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        raise RuntimeError("Found no NVIDIA driver on your system")

class Linear(_OnCuda): pass
class LayerNorm(_OnCuda): pass
class RMSNorm(_OnCuda): pass
class LayerNormLinear(_OnCuda): pass
class LayerNormMLP(_OnCuda): pass
class GroupedLinear(_OnCuda): pass
class DotProductAttention(_OnCuda): pass
class TransformerLayer(_OnCuda): pass

from . import attention, cross_entropy, distributed, fp8, module, optimizers, permutation, tensor

def fp8_autocast(*args, **kwargs):
    raise RuntimeError("Found no NVIDIA driver on your system")

fp8_model_init = checkpoint = make_graphed_callables = get_cpu_offload_context = fp8_autocast
""",
    "transformer_engine/pytorch/attention/__init__.py": "from . import rope\n",
    "transformer_engine/pytorch/attention/rope.py": """
def apply_rotary_pos_emb(*args, **kwargs):
    raise RuntimeError("Found no NVIDIA driver on your system")
""",
    "transformer_engine/pytorch/cross_entropy.py": "from .attention.rope import apply_rotary_pos_emb as "
    "parallel_cross_entropy\n",
    "transformer_engine/pytorch/distributed.py": """
class CudaRNGStatesTracker:
    pass

def checkpoint(*args, **kwargs):
    raise RuntimeError("Found no NVIDIA driver on your system")
""",
    "transformer_engine/pytorch/fp8.py": """
class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled():
        return False

def fp8_autocast(*args, **kwargs):
    raise RuntimeError("Found no NVIDIA driver on your system")

fp8_model_init = fp8_autocast
""",
    "transformer_engine/pytorch/module/__init__.py": "",
    "transformer_engine/pytorch/module/base.py": "class TransformerEngineBaseModule:\n    pass\n",
    "transformer_engine/pytorch/optimizers/__init__.py": """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, *, master_weights=False, use_decoupled_grad=False, **others):
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                                      weight_decay=weight_decay))
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int, device="cuda")

class FusedSGD(FusedAdam):
    pass

def multi_tensor_applier(op, noop_flag_buffer, tensor_lists, *args):
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)

def _on_cuda(*args):
    raise RuntimeError("Expected object of device type cuda but got device type cpu")

multi_tensor_scale = multi_tensor_l2norm = multi_tensor_adam = _on_cuda
""",
    "transformer_engine/pytorch/permutation.py": """
def moe_permute(*args, **kwargs):
    raise RuntimeError("TE needs CUDA.")

moe_permute_with_probs = moe_permute_mask_map = moe_sort_chunks_by_index = moe_permute
moe_sort_chunks_by_index_with_probs = moe_unpermute = moe_permute
""",
    "transformer_engine/pytorch/tensor/__init__.py": "class QuantizedTensor:\n    pass\n",
    "transformer_engine/pytorch/float8_tensor.py": "class Float8Tensor:\n    pass\n",
}

# Transformer Engine without the libraries of CUDA it is linked against, as its loader puts it.
UNLOADABLE_TRANSFORMER_ENGINE = {
    **_known("transformer_engine", "2.8.0"),
    "transformer_engine/__init__.py": "import transformer_engine.common\n",
    "transformer_engine/common/__init__.py": """
import ctypes

_CUDNN_LIB_CTYPES = ctypes.CDLL("libcudnn.so.of.no.version", mode=ctypes.RTLD_GLOBAL)
""",
}

# Compiled against CUDA's runtime, which is not here.
FLASH_ATTENTION = {
    **_known("flash_attn", "2.8.3"),
    "flash_attn/__init__.py": "__version__ = '2.8.3'\nfrom flash_attn.flash_attn_interface import flash_attn_func\n",
    "flash_attn/flash_attn_interface.py": "import flash_attn_2_cuda as flash_attn_gpu\n",
    "flash_attn_2_cuda.py": "raise ImportError('libcudart.so.12: cannot open shared object file: No such file')\n",
}

# Triton, which its kernels are written in, comes with CUDA builds of torch only.
LIGER_KERNEL = {
    **_known("liger_kernel", "0.8.0"),
    "liger_kernel/__init__.py": "",
    "liger_kernel/ops/__init__.py": "",
    "liger_kernel/ops/rms_norm.py": "import triton\n",
    "liger_kernel/ops/swiglu.py": "import triton\n",
    "liger_kernel/transformers/__init__.py": "from liger_kernel.ops import rms_norm\n",
}

# torch_npu without CANN. torch itself loads it, through its entry point.
TORCH_NPU = {
    **_known("torch_npu", "2.13.0", "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"),
    "torch_npu/__init__.py": "from torch_npu import _C\n",
    "torch_npu/_C.py": "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')\n",
}
