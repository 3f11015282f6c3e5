"""Patching changes a program's modules alone, and unpatching gives every name back what it was bound to."""

import subprocess
import sys
import textwrap

PROGRAM = """
    import sys, types, builtins, warnings
    warnings.simplefilter("ignore")
    import torch

    def all_names():
        owners = [m for n, m in list(sys.modules.items()) if m is not None and n.split(".")[0] in ("megatron", "torch")]
        owners = [owner for owner in owners if isinstance(owner, types.ModuleType)]
        owners += [v for m in owners for v in list(vars(m).values())
                   if isinstance(v, type) and v.__module__.split(".")[0] == "megatron"]
        owners += [builtins, torch.Tensor, torch.nn.Module]
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


def run(before):
    program = f"BEFORE = {before}\n" + textwrap.dedent(PROGRAM)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


def test_everything_is_restored_whether_megatron_was_loaded_before_or_after():
    for before in (True, False):
        done = run(before)
        assert done.stdout.strip() == "restored", done.stderr[-3000:]
