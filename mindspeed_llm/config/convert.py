"""Options of `convert_ckpt.py`."""

from __future__ import annotations

from mindspeed_llm.config.schema import at_least, option, section


@section
class ConvertConfig:
    """From which format and layout to which."""

    load_dir: str | None = option(help="checkpoint to read: HF directory, Megatron directory, or hub name")
    save_dir: str | None = option(
        help="directory to write; mg to hf with the original HF directory here writes into its mg2hf/",
        writes="directory",
    )
    load_model_type: str | None = option(help="format of --load-dir; default: found out", choices=("hf", "mg"))
    save_model_type: str = option("mg", help="format to write", choices=("hf", "mg"))
    target_tensor_parallel_size: int = option(1, help="tensor-parallel size of what is written", check=at_least(1))
    target_pipeline_parallel_size: int = option(1, help="pipeline stages of what is written", check=at_least(1))
    target_expert_parallel_size: int = option(1, help="expert-parallel size of what is written", check=at_least(1))
    hf_cfg_dir: str | None = option(help="mg to hf: where config.json and the tokenizer come from")
    params_dtype: str | None = option(
        help="type of the written tensors; default: as read", choices=("fp32", "bf16", "fp16")
    )
    qlora_nf4: bool = option(
        help="write the linears of the layers in 4 bits (NF4): hf as bitsandbytes does, mg with the ranks' parts"
    )
    save_lora_to_hf: bool = option(help="write the adapters of --lora-load alone, in PEFT's format")
