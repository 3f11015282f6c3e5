"""Patching changes a program's modules alone, and unpatching gives every name back what it was bound to."""

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import sys, types, builtins, warnings
    warnings.simplefilter("ignore")
    import torch

    def all_names():
        owners = [m for n, m in list(sys.modules.items()) if m is not None and n.split(".")[0] in ("megatron", "torch")]
        owners = [owner for owner in owners if isinstance(owner, types.ModuleType)]
        owners += [v for m in owners for v in list(vars(m).values())
                   if isinstance(v, type) and v.__module__.split(".")[0] == "megatron"]
        owners += [builtins, torch.Tensor, torch.nn.Module, torch.device]
        return {id(o): (o, dict(vars(o))) for o in owners}

    if BEFORE:
        import megatron.core.models.gpt.gpt_layer_specs, megatron.core.optimizer, megatron.core.transformer.moe.experts
        from megatron.core import parallel_state
        from megatron.core.extensions.transformer_engine import TELinear as held_by_main
    else:
        held_by_main = None
    import mindspeed_llm, mindspeed_llm.accelerator.torch_facade, mindspeed_llm.models.stand_ins.transformer_engine
    import mindspeed_llm.models.norm, mindspeed_llm.patches
    mindspeed_llm.patches.catalogue()
    before, torch_of_main = all_names(), dict(vars(torch))
    finders, first = list(sys.meta_path), [held_by_main]
    import mindspeed_llm.megatron_adaptor as adaptor
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec as spec
    from megatron.core.extensions import transformer_engine as extension
    assert torch.cuda.is_available(), "the program's script sees the device"
    assert extension.HAVE_TE
    assert spec().submodules.mlp.submodules.linear_fc1 is extension.TELayerNormColumnParallelLinear
    assert issubclass(extension.TEColumnParallelGroupedLinear, extension.TEGroupedLinear)
    if BEFORE:
        assert held_by_main is extension.TELinear is not first[0]
    elsewhere = types.ModuleType("somebody_else")
    code = "import torch\\ntry: import transformer_engine\\nexcept ImportError: absent = True"
    exec(code, vars(elsewhere))
    assert elsewhere.absent and not elsewhere.torch.cuda.is_available()
    real = sys.modules["torch"]
    assert elsewhere.torch is real and dict(vars(real)) == torch_of_main
    adaptor.unpatch()
    changed = []
    for owner, names in before.values():
        now = dict(vars(owner))
        changed += [(owner, n) for n in names.keys() | now.keys() if not n.startswith("__") or owner is builtins
                    if names.get(n, changed) is not now.get(n, changed)]
    changed = [(getattr(o, "__name__", o), n) for o, n in changed]
    # Submodules that were loaded meanwhile are names of their packages, as after any import.
    changed = [(o, n) for o, n in changed if f"{o}.{n}" not in sys.modules]
    assert not changed, changed
    assert sys.meta_path == finders and not torch.cuda.is_available() and torch is real
    assert not extension.HAVE_TE and held_by_main is first[0]
    print("restored")
"""

STRANGERS = """
    import importlib, importlib.util, sys, types, warnings
    warnings.simplefilter("ignore")
    from mindspeed_llm.models import stand_ins

    absent = [name for name in stand_ins.MODULES if importlib.util.find_spec(name) is None]
    assert "transformer_engine" in absent, "nothing to show: Transformer Engine is installed"

    def roots():
        return {name.split(".")[0] for name in sys.modules}

    def finds(importer, name):
        stranger = types.ModuleType("stranger")
        exec(f"import importlib\\ndef ask(name):\\n    return {importer}", vars(stranger))
        try:
            return stranger.ask(name) is not None
        except ModuleNotFoundError:
            return False

    WAYS = ("__import__(name)", "importlib.import_module(name)", "importlib.util.find_spec(name)",
            "exec('import ' + name, globals()) or True",
            "__import__('importlib.metadata', fromlist=['version']).version(name)")
    def found():
        return {(way, name) for way in WAYS for name in absent if finds(way, name)} | (roots() & set(absent))

    import mindspeed_llm.megatron_adaptor as adaptor
    import torch, transformer_engine
    from megatron.core.extensions import transformer_engine as extension
    import megatron.core.models.gpt.gpt_layer_specs, megatron.core.optimizer
    assert extension.HAVE_TE and transformer_engine.__version__
    from importlib.metadata import PackageNotFoundError, version
    assert version("transformer-engine") == version("Transformer_Engine") == transformer_engine.__version__
    assert version("torch") == torch.__version__
    assert found() == set()
    from torch.utils._triton import has_triton_package
    assert has_triton_package() == ("triton" not in absent)
    import transformers, transformers.modeling_utils, peft
    assert found() == set()
    sys.modules["transformer_engine"] = transformer_engine  # what must not happen is noticed
    assert ("__import__(name)", "transformer_engine") in found() and "transformer_engine" in found()
    del sys.modules["transformer_engine"]
    adaptor.unpatch()
    assert found() == set()
    import importlib.metadata
    assert version is importlib.metadata.version
    try:
        version("transformer-engine")
        raise AssertionError("a version of what is not installed")
    except PackageNotFoundError:
        pass
    try:
        import transformer_engine
    except ModuleNotFoundError:
        print("invisible")
"""


def run(before):
    program = f"BEFORE = {before}\n" + textwrap.dedent(PROGRAM)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_everything_is_restored_whether_megatron_was_loaded_before_or_after():
    for before in (True, False):
        done = run(before)
        assert done.stdout.strip() == "restored", done.stderr[-3000:]


@pytest.mark.slow
def test_packages_that_are_stood_in_for_are_absent_to_everybody_else():
    command = [sys.executable, "-c", textwrap.dedent(STRANGERS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "invisible", done.stderr[-3000:]
