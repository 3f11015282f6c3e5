"""QLoRA: adapters on a base in NF4 compute and learn what adapters on the dequantised weights do; merging; files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_llm.errors import UserError

SIZES = dict(hidden_size=128, intermediate_size=192, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
EXPERTS = dict(
    moe_intermediate_size=64,
    num_experts=4,
    num_experts_per_tok=2,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    norm_topk_prob=True,
)
RUN = (
    "--stage sft --prompt-type chatml --seq-length 128 --lr 2e-2 --lr-decay-style constant --global-batch-size 4 "
    "--micro-batch-size 2 --split 1 --train-iters 3 --lora-r 4 --lora-alpha 12 --progress lines --num-threads 1"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama whose rows are whole blocks."""
    from mindspeed_llm.checkpoint.toy import make_toy

    return make_toy("llama", tmp_path_factory.mktemp("base") / "llama", **SIZES)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Experts likewise."""
    from mindspeed_llm.checkpoint.toy import make_toy

    return make_toy("qwen3_moe", tmp_path_factory.mktemp("base") / "moe", num_hidden_layers=2, **SIZES, **EXPERTS)


@pytest.fixture(scope="module")
def in_nf4(base, convert_door, tmp_path_factory):
    """The same in bitsandbytes' files."""
    out = tmp_path_factory.mktemp("nf4") / "llama"
    convert_door(f"--load-dir {base} --save-dir {out} --save-model-type hf --qlora-nf4")
    return out


@pytest.fixture(scope="module")
def tuned_on_nf4(base, post_train, rows, tmp_path_factory):
    """Adapters of a QLoRA run of three steps."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINDSPEED_LLM_CACHE", str(out.parent / "cache"))
        post_train(RUN, f"--load {base} --data-path {rows} --qlora --save {out}")
    return out


def adapted(directory, quantized, targets=("all-linear",), grouped=False, dropout=0.0, recompute=None, dora=False):
    """A model with adapters on NF4, or on the numbers that it stands for."""
    from mindspeed_llm.checkpoint.hf import HfSource
    from mindspeed_llm.checkpoint.load import load_into
    from mindspeed_llm.checkpoint.quantized import DequantizedSource
    from mindspeed_llm.lora.inject import inject_adapters
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.models.moe.options import ExpertOptions
    from mindspeed_llm.parallel.setup import initialize_distributed
    from mindspeed_llm.plan.adapters import AdapterSettings, resolve_targets

    initialize_distributed()
    source = HfSource(directory)
    options = BuildOptions(
        quantized_linears=quantized,
        experts=ExpertOptions(grouped_gemm=grouped),
        recompute_granularity=recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        initialize=False,
    )
    model = build_model(source.shape, options)
    load_into(model, source if quantized else DequantizedSource(source), quiet=True)
    model.requires_grad_(False)
    found = resolve_targets(list(targets), source.shape)
    settings = AdapterSettings(rank=4, alpha=8.0, dropout=dropout, targets=found.targets, use_dora=dora)
    inject_adapters(model, settings)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05, generator=generator)
    return model


def loss_and_gradients(model):
    """Loss of a batch, and the gradient of every trained parameter."""
    generator = torch.Generator().manual_seed(7)
    ids, labels = (torch.randint(0, 997, (2, 12), generator=generator) for _ in range(2))
    torch.manual_seed(11)
    loss = model(ids, labels=labels).sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "how",
    [{}, {"dropout": 0.2}, {"recompute": "full"}, {"recompute": "selective"}],
    ids=["plain", "dropout", "full recomputation", "selective recomputation"],
)
def test_gradients_are_those_of_adapters_on_the_dequantised_weights(base, how):
    loss, gradients = loss_and_gradients(adapted(base, True, **how))
    expected, wanted = loss_and_gradients(adapted(base, False, **how))
    assert torch.equal(loss, expected) and gradients.keys() == wanted.keys()
    assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)
    assert all(float(gradient.abs().max()) > 0 for gradient in wanted.values())


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("linear_fc2",)])
def test_linears_without_an_adapter_are_in_nf4_too(base, targets):
    loss, gradients = loss_and_gradients(adapted(base, True, targets))
    expected, wanted = loss_and_gradients(adapted(base, False, targets))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert all(torch.allclose(gradients[n], wanted[n], rtol=1e-4, atol=1e-6) for n in wanted)


@pytest.mark.parametrize("grouped, dora", [(False, False), (True, False), (False, True), (True, True)])
def test_experts_in_nf4_compute_what_the_dequantised_do(experts, grouped, dora):
    loss, gradients = loss_and_gradients(adapted(experts, True, grouped=grouped, dora=dora))
    expected, wanted = loss_and_gradients(adapted(experts, False, grouped=grouped, dora=dora))
    assert dora == any("experts.linear_fc1.lora_magnitude" in name for name in wanted)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert all(torch.allclose(gradients[n], wanted[n], rtol=1e-4, atol=1e-6) for n in wanted)


def test_the_comparison_notices_a_scale(base):
    """One 8-bit scale of one block, to its neighbour."""
    from mindspeed_llm.models.nf4_weight import nf4_weights

    model = adapted(base, True)
    weight = nf4_weights(model)["decoder.layers.2.mlp.linear_fc2.weight"]
    weight.matrices[0].scales[0, 0] ^= 1
    _, gradients = loss_and_gradients(model)
    _, wanted = loss_and_gradients(adapted(base, False))
    assert any(not torch.equal(gradients[name], wanted[name]) for name in wanted)


def test_every_linear_of_the_layers_is_held_in_nf4_and_nothing_dense_waits_for_the_backward_pass(base):
    from mindspeed_llm.models.mapping import tensor_pairs
    from mindspeed_llm.models.nf4_weight import is_quantized, nf4_weights

    model = adapted(base, True)
    weights = nf4_weights(model)
    assert set(weights) == {pair.mcore for pair in tensor_pairs(model.config.shape) if is_quantized(pair.mcore)}
    assert not any(is_quantized(name) for name, _ in model.named_parameters())
    held, numbers = sum(w.num_bytes for w in weights.values()), sum(w.numel() for w in weights.values())
    assert held <= 0.28 * 2 * numbers
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        loss_and_gradients(model)
    assert not {tuple(weight.shape) for weight in weights.values()} & set(saved)


def test_a_run_records_its_base_in_nf4_and_resumes_on_it(base, tuned_on_nf4, post_train, rows, tmp_path):
    from mindspeed_llm.plan.source import find_source

    record = find_source(tuned_on_nf4).record["base"]
    assert record["quantized"] == {"type": "nf4", "block_size": 64, "scale_block_size": 256}
    short = RUN.replace("--train-iters 3", "--train-iters 3 --exit-interval 1")
    out = tmp_path / "out"
    post_train(short, f"--load {base} --data-path {rows} --qlora --save {out}")
    post_train(RUN.replace("--lora-r 4 --lora-alpha 12", ""), f"--data-path {rows} --lora-load {out} --load {base}",
               f"--save {out}")  # fmt: skip
    resumed, whole = (adapter_values(directory) for directory in (out, tuned_on_nf4))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[n], whole[n]) for n in whole)
    with pytest.raises(UserError, match="--qlora: False contradicts the adapters"):
        post_train(RUN, f"--load {base} --data-path {rows} --no-qlora --lora-load {out} --save {out}")


def adapter_values(directory):
    """Every stored tensor of the model in an adapter checkpoint; there are adapters alone."""
    from torch.distributed.checkpoint import FileSystemReader, load

    from mindspeed_llm.plan.source import find_source

    reader = FileSystemReader(str(find_source(directory).directory))
    metadata = reader.read_metadata().state_dict_metadata
    keys = [key for key in metadata if key.startswith("decoder.") and hasattr(metadata[key], "size")]
    assert keys and all(".lora_" in key for key in keys)
    state = {key: torch.empty(metadata[key].size, dtype=metadata[key].properties.dtype) for key in keys}
    load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.mark.parametrize("into", ["dequantized", "original"])
def test_merging_into_either_base(base, tuned_on_nf4, convert_door, our_logits, hf_logits, tmp_path, into):
    from safetensors import safe_open

    merged = tmp_path / "merged"
    flags = "" if into == "dequantized" else "--qlora-merge-base original"
    convert_door(f"--load-dir {base} --lora-load {tuned_on_nf4} --save-model-type hf --save-dir {merged} {flags}")
    trained, found = our_logits(base, tuned_on_nf4), hf_logits(merged)
    error = float((trained - found).abs().max())
    assert error < 1e-4 if into == "dequantized" else error > 1e-2
    with safe_open(merged / "model.safetensors", "pt") as file:
        assert file.metadata()["merge_base"] == into
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())


def test_merging_on_loading_gives_the_same_answers(base, tuned_on_nf4, our_logits):
    unmerged, merged = our_logits(base, tuned_on_nf4), our_logits(base, tuned_on_nf4, merge=True)
    assert float((unmerged - merged).abs().max()) < 1e-4


def test_files_of_bitsandbytes_are_what_is_quantised_on_loading(base, in_nf4, our_logits, tuned_on_nf4):
    """The layout of the file is spelled out here, from bitsandbytes' definition, and not taken from our writer."""
    from mindspeed_llm.ops.nf4 import NF4, dynamic_codes, quantize_nf4

    stored, original = load_file(in_nf4 / "model.safetensors"), load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    expected = quantize_nf4(original[name])
    state = json.loads(bytes(stored[f"{name}.quant_state.bitsandbytes__nf4"].numpy()))
    assert torch.equal(stored[name], expected.packed[:, None])
    assert torch.equal(stored[f"{name}.absmax"], expected.scales.codes)
    assert torch.equal(stored[f"{name}.nested_absmax"], expected.scales.scales)
    assert torch.equal(stored[f"{name}.quant_map"], torch.tensor(NF4))
    assert torch.equal(stored[f"{name}.nested_quant_map"], dynamic_codes())
    assert state == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [128, 192],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": float(expected.scales.mean),
    }
    untouched = [n for n in original if "norm" in n or "embed" in n or "lm_head" in n]
    assert untouched and all(torch.equal(stored[n], original[n]) for n in untouched)
    assert torch.equal(our_logits(in_nf4, tuned_on_nf4), our_logits(base, tuned_on_nf4))


def test_a_single_quantisation_is_read_too(base, tmp_path):
    """transformers' default: scales in fp32."""
    from mindspeed_llm.checkpoint.hf import HfSource
    from mindspeed_llm.ops.nf4 import NF4, dequantize_nf4, quantize_nf4

    tensors, name = load_file(base / "model.safetensors"), "model.layers.0.self_attn.k_proj.weight"
    single = quantize_nf4(tensors.pop(name), double=False)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(single.shape)}
    tensors |= {
        name: single.packed[:, None].clone(),
        f"{name}.absmax": single.scales,
        f"{name}.quant_map": torch.tensor(NF4),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    write_directory(tmp_path, base, tensors)
    source, mcore = HfSource(tmp_path), "decoder.layers.0.self_attention.linear_qkv.weight"
    assert torch.equal(source.read_part(mcore, 1, 32, 64), dequantize_nf4(single)[32:64])
    assert torch.equal(source.read_nf4(mcore, 1, 32, 64).dense(torch.float32), dequantize_nf4(single)[32:64])


def write_directory(directory, base, tensors):
    """A model directory with the base's config and these tensors."""
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text((base / "config.json").read_text())


@pytest.mark.parametrize(
    "change, says",
    [
        ({"blocksize": 128}, "has blocksize=128; legal: blocksize=64"),
        ({"nested_blocksize": 128}, "has nested_blocksize=128"),
        ({"quant_type": "fp4"}, "has quant_type='fp4'"),
        ({"shape": None}, "is damaged"),
    ],
)
def test_other_ways_of_quantising_are_refused(base, in_nf4, tmp_path, change, says):
    from mindspeed_llm.checkpoint.hf import HfSource

    tensors = load_file(in_nf4 / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].numpy())) | change
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    write_directory(tmp_path, base, tensors)
    with pytest.raises(UserError, match=says):
        HfSource(tmp_path)


def test_fp4_and_8_bit_weights_are_refused(base, tmp_path):
    from mindspeed_llm.checkpoint.hf import HfSource

    for end in (".quant_state.bitsandbytes__fp4", ".SCB"):
        tensors = load_file(base / "model.safetensors")
        tensors[f"model.layers.0.mlp.up_proj.weight{end}"] = torch.zeros(4, dtype=torch.uint8)
        write_directory(tmp_path, base, tensors)
        with pytest.raises(UserError, match="legal: 4-bit weights of type nf4, or unquantised weights"):
            HfSource(tmp_path)


def test_weights_in_nf4_are_written_dense_again(in_nf4, base, convert_door, our_logits, tmp_path):
    out = tmp_path / "dense"
    convert_door(f"--load-dir {in_nf4} --save-dir {out} --save-model-type hf")
    dense = load_file(out / "model.safetensors")
    assert dense.keys() == load_file(base / "model.safetensors").keys()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert torch.equal(our_logits(out), our_logits(in_nf4))


def test_what_cannot_be_is_refused(base, in_nf4, tuned_on_nf4, toy_llama, post_train, convert_door, rows, tmp_path):
    data, plain = f"--data-path {rows} --save {tmp_path / 'out'}", RUN.replace("--lora-r 4 --lora-alpha 12", "")
    with pytest.raises(UserError, match="--qlora needs adapters"):
        post_train(plain, f"--load {base} --qlora {data}")
    with pytest.raises(UserError, match="holds weights in NF4 and would be trained without --qlora"):
        post_train(RUN, f"--load {in_nf4} {data}")
    with pytest.raises(UserError, match=r"columns of linear_fc2 112 / 1 % 64 = 0 .* legal: LoRA without --qlora"):
        post_train(RUN, f"--load {toy_llama} --qlora {data}")
    with pytest.raises(UserError, match="original is wrong, because .* is in NF4 itself"):
        merge = f"--lora-load {tuned_on_nf4} --qlora-merge-base original"
        convert_door(f"--load-dir {in_nf4} {merge} --save-model-type hf --save-dir {tmp_path / 'merged'}")
    with pytest.raises(UserError, match="is in NF4 already"):
        convert_door(f"--load-dir {in_nf4} --qlora-nf4 --save-model-type hf --save-dir {tmp_path / 'again'}")
    with pytest.raises(UserError, match="--qlora-nf4 has no meaning with --save-lora-to-hf"):
        export = f"--lora-load {tuned_on_nf4} --save-lora-to-hf --save-dir {tmp_path / 'adapters'}"
        convert_door(f"--load-dir {base} --qlora-nf4 {export}")
    convert_door(f"--load-dir {base} --qlora-nf4 --save-dir {tmp_path / 'mg'}")
    with pytest.raises(UserError, match="holds weights in NF4 and would be trained without --qlora"):
        post_train(RUN, f"--load {tmp_path / 'mg'} {data}")


def test_the_plan_counts_what_nf4_holds(base, rows, capsys, post_train, tmp_path):
    from mindspeed_llm.checkpoint.hf import HfSource
    from mindspeed_llm.models.mapping import tensor_pairs
    from mindspeed_llm.models.nf4_weight import is_quantized, nf4_weights

    weights = {}
    for flag in ("", "--qlora"):
        post_train(RUN, f"--load {base} --data-path {rows} --save {tmp_path} --dry-run {flag}")
        shown = capsys.readouterr().out
        assert ("linears of the layers in NF4" in shown) == bool(flag)
        [line] = [line for line in shown.splitlines() if line.strip("│ ").startswith("weights ") and "MiB" in line]
        weights[flag] = float(line.split()[-3])
    shape = HfSource(base).shape
    pairs = {pair.mcore: torch.Size(pair.dims).numel() for pair in tensor_pairs(shape)}
    held = sum(weight.num_bytes for weight in nf4_weights(adapted(base, True)).values())
    saved = 4 * sum(count for name, count in pairs.items() if is_quantized(name)) - held
    assert weights[""] - weights["--qlora"] == pytest.approx(saved / 2**20, rel=0.02, abs=0.1)


@torch.no_grad()
def test_a_model_answers_from_nf4(base, in_nf4, tokens, our_logits):
    """Without adapters: `--qlora` for inference, from either directory, against the dequantised weights."""
    from mindspeed_llm.api import model_from_plan
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.models.nf4_weight import nf4_weights
    from mindspeed_llm.plan.plan import resolve

    for directory in (base, in_nf4):
        parsed = parse("inference", ["--load", str(directory), "--qlora", "--fp32", "--device", "cpu"])
        model = model_from_plan(resolve(parsed.config, parsed.problems)).model
        assert nf4_weights(model)
        assert float((model(tokens, gather_logits=True) - our_logits(in_nf4)).abs().max()) < 1e-4
