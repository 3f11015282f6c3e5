"""A tiny random Hugging Face checkpoint with a real tokenizer, for trying things out and for tests. Deterministic."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_llm.errors import UserError

VOCAB_SIZE = 997
"""Prime, so divisible by no tensor-parallel size."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
_PLAIN = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}

# tokenizer_config.json of meta-llama/Llama-2-7b-hf, mistralai/Mistral-7B-v0.1 and deepseek-ai/DeepSeek-V3. Qwen's base
# models have what is plain here.
_SENTENCEPIECE = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_DEEPSEEK = {
    "bos_token": "<｜begin▁of▁sentence｜>",
    "eos_token": "<｜end▁of▁sentence｜>",
    "pad_token": "<｜end▁of▁sentence｜>",
}
_PUBLISHED: dict[str, dict[str, str]] = {
    "llama": _SENTENCEPIECE,
    "mistral": _SENTENCEPIECE,
    "mixtral": _SENTENCEPIECE,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
}

# 4 layers, groups < heads, head_dim * heads != hidden: what a wrong layout cannot get right by luck
_DIMENSIONS = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    # large enough for the layers to matter in the logits
    "initializer_range": 0.1,
}

_LATENT_ATTENTION = {
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "head_dim": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    # the size of the latents' norms' epsilon is fixed; another one here shows which norm uses which
    "rms_norm_eps": 1e-5,
}
_OF_TYPE: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT_ATTENTION,
    "deepseek_v3": {**_LATENT_ATTENTION, "n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 0},
}


def make_toy(
    model_type: str, directory: str | Path, *, seed: int = 0, published_tokens: bool = False, **overrides: Any
) -> Path:
    """Write a tiny model of random weights with config, tokenizer, chat template and generation config.

    Args:
        model_type: HF model type, e.g. "llama", "mistral", "qwen2", "qwen3".
        directory: where to; created.
        seed: of the weights; the same arguments give the same bytes.
        published_tokens: the tokenizer begins, ends and pads texts with the special tokens of the published models of
            this type, so that their templates fit; otherwise every type's has `<|endoftext|>` alone.
        overrides: fields of config.json, e.g. `num_hidden_layers=2`, `tie_word_embeddings=True`; `dtype` (a string)
            for the type of the weights. With `num_nextn_predict_layers` the file gets the weights of such layers too,
            which transformers' class does not have.

    Returns:
        The directory.

    Raises:
        UserError: transformers has no such model type, or the vocabulary is too small for the tokenizer.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    special = _PUBLISHED.get(model_type, _PLAIN) if published_tokens else _PLAIN
    tokenizer = train_toy_tokenizer(overrides.get("vocab_size", VOCAB_SIZE), special)
    dtype = overrides.pop("dtype", "float32")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = AutoConfig.for_model(model_type, **{**_DIMENSIONS, **_OF_TYPE.get(model_type, {}), **ids, **overrides})
    except (ValueError, StrictDataclassError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"toy model: {model_type!r} or one of its fields is not legal in transformers ({why})"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        _randomise_constant_parameters(model)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    _add_prediction_layers(directory, seed)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    GenerationConfig(**ids | {"eos_token_id": [stop, tokenizer.eos_token_id]}).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def train_toy_tokenizer(vocab_size: int = VOCAB_SIZE, special_tokens: Mapping[str, str] = _PLAIN) -> Any:
    """A byte-level BPE tokenizer trained on the texts of Python's `help()`, as a transformers tokenizer.

    Args:
        vocab_size: tokens including the 256 bytes and the special ones.
        special_tokens: `eos_token` and, where there are such, `bos_token`, with which each text then begins,
            `pad_token` and `unk_token`.

    Raises:
        UserError: vocab_size is below 300.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 300:
        raise UserError(f"toy model: vocab_size={vocab_size} is too small for bytes and special tokens; legal: >= 300")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys((*special_tokens.values(), *CHAT_TOKENS))),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    topics = pydoc_data.topics.topics
    bpe.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    begin = special_tokens.get("bos_token")
    if begin is not None:
        bpe.post_processor = processors.TemplateProcessing(
            single=[begin, "$A"], special_tokens=[(begin, bpe.token_to_id(begin))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=256, **special_tokens)
    tokenizer.chat_template = CHAT_TEMPLATE if begin is None else "{{ bos_token }}" + CHAT_TEMPLATE
    return tokenizer


def edit_config(directory: str | Path, **fields: Any) -> None:
    """Change fields of a checkpoint's config.json in place; None removes a field."""
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(fields)
    kept = {name: value for name, value in config.items() if name not in fields or value is not None}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _add_prediction_layers(directory: Path, seed: int) -> None:
    """Random weights for the multi-token prediction layers that config.json counts, and the copies in them."""
    import torch
    from safetensors.torch import load_file, save_file

    from mindspeed_llm.models.hf_config import read_hf_config, shape_from_hf
    from mindspeed_llm.models.mapping import tensor_pairs
    from mindspeed_llm.models.tensor_names import is_mtp

    config = read_hf_config(directory)
    if not config.get("num_nextn_predict_layers"):
        return
    file = directory / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(seed)
    dtype = tensors["model.norm.weight"].dtype
    for pair in tensor_pairs(shape_from_hf(config)):
        tensors |= {copy: tensors[pair.hf[0]].clone() for copy in pair.hf_copies}
        if is_mtp(pair.mcore):
            for name, dims in zip(pair.hf, pair.hf_dims):
                drawn = torch.randn(dims, generator=generator) * config["initializer_range"]
                tensors[name] = (drawn + 1 if "norm" in name else drawn).to(dtype)
    save_file(tensors, file, {"format": "pt"})


def _randomise_constant_parameters(model: Any) -> None:
    """Norm weights start at one, biases and the experts' score corrections at zero: move them, or nobody would notice
    a mapping that loses them."""
    import torch

    with torch.no_grad():
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * (0.02 if name.endswith("bias") else 0.1))
