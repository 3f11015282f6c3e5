"""Every option of a training door changes the plan, what is handed to megatron-core, the data, or the output.

Each option is changed alone, and everything that a run derives from its options before the first matrix product is
looked at: the plan and how it is shown, the builder's options, optimizer and schedule, data parallelism, which
parameters are trained, operators, processes, preprocessing, the batches, and when the loop logs, evaluates and saves.
"""

from __future__ import annotations

import collections
import itertools
import json
import re
import types
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mindspeed_llm.config.parser import parse
from mindspeed_llm.config.run import all_options, door_options
from mindspeed_llm.errors import UserError

ROOT = Path(__file__).parents[3]
ABSENT = object()

SHAPE = {
    "num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 6, "num_query_groups": 2,
    "group_query_attention": True, "vocab_size": 997, "max_position_embeddings": 256, "normalization": "RMSNorm",
    "swiglu": True, "disable_bias_linear": True,
}  # fmt: skip
NO_SHAPE = dict.fromkeys(SHAPE, ABSENT)
LLAMA3 = {"rope_scaling_type": "llama3", "rope_scaling_factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "rope_scaling_original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_scaling_type": "yarn", "rope_scaling_factor": 2.0, "rope_scaling_original_max_position_embeddings": 64}
LATENT = {
    "multi_latent_attention": True, "kv_lora_rank": 20, "qk_head_dim": 12, "qk_pos_emb_head_dim": 8, "v_head_dim": 10,
    "group_query_attention": ABSENT, "num_query_groups": ABSENT,
}  # fmt: skip
WSD = {"lr_decay_style": "WSD"}
CUT = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
TWO_STAGES = {"pipeline_model_parallel_size": 2}
MOE = {"num_experts": 4}
BIASED = {**MOE, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
FULL = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}


@dataclass
class Case:
    """One option: from `before` to `after`, with other options around it.

    Attributes:
        refused: which side is an error ("before", "after", or neither); for what must be given or must not.
    """

    after: Any
    before: Any = ABSENT
    refused: str = ""
    around: dict[str, Any] = field(default_factory=dict)


def case(after, before=ABSENT, refused="", **around):
    return Case(after, before, refused, around)


# "@name" stands for a path that a fixture makes.
CASES: dict[str, Case] = {
    # data
    "data_path": case(["@other_rows"], before=["@rows"]),
    "handler_name": case("GeneralPretrainHandler"),
    "prompt_type": case("chatml"),
    "prompt_type_path": case("@templates", prompt_type="chatml"),
    "json_keys": case(["body"]),
    "map_keys": case({"prompt": "question"}),
    "seq_length": case(64),
    "pack": case(True),
    "neat_pack": case(True),
    "append_eod": case(True),
    "workers": case(2),
    "max_samples": case(5),
    "max_bad_rows": case(3),
    "enable_thinking": case("true"),
    "hf_datasets_params": case("@hf_params"),
    "cache_dir": case("@cache"),
    "overwrite_cache": case(True),
    "split": case("50,50,0"),
    "seed": case(7),
    # tokenizer
    "tokenizer_name_or_path": case("@toy_qwen"),
    "tokenizer_model": case("@toy_qwen", tokenizer_name_or_path=ABSENT, load="@toy_llama", **NO_SHAPE),
    "tokenizer_type": case("Llama2Tokenizer"),
    "tokenizer_not_use_fast": case(True),
    "trust_remote_code": case(True),
    # model
    "hf_config": case("@toy_qwen", before="@toy_llama", **NO_SHAPE),
    "model_type_hf": case("qwen25"),
    "num_layers": case(2),
    "hidden_size": case(60),
    "ffn_hidden_size": case(96),
    "num_attention_heads": case(4),
    "group_query_attention": case(ABSENT, before=True, refused="after"),
    "num_query_groups": case(3),
    "kv_channels": case(16),
    "vocab_size": case(1001),
    "max_position_embeddings": case(512),
    "position_embedding_type": case("learned", refused="after"),
    "rotary_base": case(5e5),
    "rotary_percent": case(0.5),
    "rope_scaling_type": case("linear", before="dynamic", rope_scaling_factor=2.0),
    "rope_scaling_factor": case(4.0, before=2.0, rope_scaling_type="linear"),
    "rope_scaling_original_max_position_embeddings": case(32, before=64, **LLAMA3),
    "low_freq_factor": case(2.0, before=1.0, **LLAMA3),
    "high_freq_factor": case(8.0, before=4.0, **LLAMA3),
    "beta_fast": case(16.0, **YARN),
    "beta_slow": case(2.0, **YARN),
    "rope_scaling_mscale": case(0.7, **YARN, rope_scaling_mscale_all_dim=1.0),
    "rope_scaling_mscale_all_dim": case(0.7, **YARN, rope_scaling_mscale=1.0),
    "multi_latent_attention": case(True, refused="before", **{**LATENT, "multi_latent_attention": ABSENT}),
    "q_lora_rank": case(24, **LATENT),
    "kv_lora_rank": case(32, **LATENT),
    "qk_head_dim": case(16, **LATENT),
    "qk_pos_emb_head_dim": case(4, **LATENT),
    "v_head_dim": case(16, **LATENT),
    "mtp_num_layers": case(1, **LATENT),
    "mtp_loss_scaling_factor": case(0.3, **LATENT, mtp_num_layers=1),
    "normalization": case("LayerNorm", before="RMSNorm", refused="after"),
    "norm_epsilon": case(1e-6),
    "swiglu": case(ABSENT, before=True, refused="after"),
    "disable_bias_linear": case(ABSENT, before=True, refused="after"),
    "add_qkv_bias": case(True),
    "add_dense_bias": case(True),
    "qk_layernorm": case(True),
    "untie_embeddings_and_output_weights": case(True),
    "sliding_window": case(8),
    "attn_logit_softcapping": case(2.0),
    "init_method_std": case(0.5),
    "attention_dropout": case(0.1),
    "hidden_dropout": case(0.1),
    "make_vocab_size_divisible_by": case(128),
    "truncate_layers": case(2, load="@toy_llama", **NO_SHAPE),
    "ignore_config_field": case(["strange_field"], refused="before", hf_config="@strange", **NO_SHAPE),
    # experts
    "num_experts": case(8, **MOE),
    "moe_layer_freq": case("2", **MOE),
    "moe_ffn_hidden_size": case(40, **MOE),
    "moe_shared_expert_intermediate_size": case(64, **MOE),
    "moe_shared_expert_gate": case(True, **MOE, moe_shared_expert_intermediate_size=64),
    "moe_router_topk": case(3, **MOE),
    "moe_router_score_function": case("sigmoid", **MOE),
    "moe_router_pre_softmax": case(True, **MOE),
    "norm_topk_prob": case(True, **MOE),
    "moe_router_num_groups": case(4, before=2, **MOE, moe_router_group_topk=2),
    "moe_router_group_topk": case(2, before=1, **MOE, moe_router_num_groups=2),
    "moe_router_topk_scaling_factor": case(2.5, **MOE),
    "moe_router_enable_expert_bias": case(True, **MOE, moe_router_score_function="sigmoid"),
    "moe_grouped_gemm": case(True, **MOE),
    "moe_permute_fusion": case(False, **MOE),
    "moe_token_dispatcher_type": case("allgather", **MOE),
    "moe_shared_expert_overlap": case(
        True, **MOE, moe_shared_expert_intermediate_size=64, expert_model_parallel_size=2
    ),
    "moe_alltoall_overlap_comm": case(True, **MOE, expert_model_parallel_size=2),
    "moe_router_dtype": case("fp32", **MOE),
    "moe_router_load_balancing_type": case(["seq_aux_loss"], **MOE, moe_aux_loss_coeff=[0.1]),
    "moe_aux_loss_coeff": case([0.1], **MOE),
    "moe_z_loss_coeff": case(0.001, **MOE),
    "moe_router_bias_update_rate": case(0.01, **BIASED),
    "moe_expert_capacity_factor": case(1.5, **MOE),
    "moe_pad_expert_input_to_capacity": case(True, **MOE, moe_expert_capacity_factor=1.5),
    "moe_token_drop_policy": case("position", **MOE, moe_expert_capacity_factor=1.5),
    # parallel and runtime
    "tensor_model_parallel_size": case(2),
    "pipeline_model_parallel_size": case(2),
    "num_layers_per_virtual_pipeline_stage": case(1, pipeline_model_parallel_size=2, global_batch_size=8),
    "num_virtual_stages_per_pipeline_rank": case(2, pipeline_model_parallel_size=2, global_batch_size=8),
    "account_for_embedding_in_pipeline_split": case(True, refused="before", num_layers=3, **TWO_STAGES),
    "account_for_loss_in_pipeline_split": case(True, refused="before", num_layers=3, **TWO_STAGES),
    "num_layer_list": case("3,1", **TWO_STAGES),
    "noop_layers": case("0,5", **TWO_STAGES),
    "sequence_parallel": case(True, tensor_model_parallel_size=2),
    "context_parallel_size": case(2),
    "context_parallel_algo": case("ulysses_cp_algo", context_parallel_size=2),
    "expert_model_parallel_size": case(2, **MOE),
    "expert_tensor_parallel_size": case(1, tensor_model_parallel_size=2, sequence_parallel=True, **MOE),
    "cp_window_size": case(2, context_parallel_size=4),
    "ulysses_degree_in_cp": case(2, before=1, context_parallel_size=4, context_parallel_algo="hybrid_cp_algo"),
    "use_distributed_optimizer": case(True),
    "overlap_grad_reduce": case(True),
    "overlap_param_gather": case(True, use_distributed_optimizer=True, overlap_grad_reduce=True),
    "bf16": case(True),
    "fp16": case(True),
    "device": case("cpu"),
    "npu_deterministic": case(True, refused="after"),  # no NPU here; tests/ascend has one
    "hccl_group_buffer": case("dp:100", refused="after"),
    "num_threads": case(3),
    "cpu_allocator": case("keep"),
    "distributed_timeout_minutes": case(3.0),
    "hang_timeout": case(90.0),
    "exit_signal_handler": case(False, save="@new"),
    # operators
    "use_flash_attn": case(False),
    "use_fused_rmsnorm": case(False),
    "use_fused_swiglu": case(False),
    "use_fused_rotary_pos_emb": case(False),
    "compile_operators": case(True),
    "gradient_accumulation_fusion": case(True),
    "use_ascend_coc": case(True, **CUT),
    "coc_parallel_num": case(4, before=2, **CUT, use_ascend_coc=True),
    "use_ascend_mc2": case(True, refused="after", **CUT),
    "cross_entropy_loss_fusion": case(False),
    "loss_compute_mode": case("chunk"),
    "loss_chunk_size": case(17),
    # training
    "stage": case("other", refused="after"),
    "micro_batch_size": case(2, global_batch_size=8),
    "global_batch_size": case(8),
    "train_iters": case(7, before=6),
    "train_epochs": case(2.0, before=1.0, train_iters=ABSENT),
    "train_samples": case(16, before=8, train_iters=ABSENT),
    "exit_interval": case(2),
    "exit_duration_in_mins": case(2.0),
    "eval_interval": case(2),
    "eval_iters": case(0),
    "eval_only": case(True),
    "trainable": case(["linear_fc1"]),
    "freeze": case(["linear_fc1"]),
    "trainable_layers": case("last:1"),
    "frozen_layers": case("first:1"),
    "recompute_granularity": case("selective"),
    "recompute_method": case("uniform", before="block", **FULL),
    "recompute_num_layers": case(2, before=1, **FULL),
    "recompute_modules": case(["layernorm"], recompute_granularity="selective"),
    "enable_recompute_layers_per_pp_rank": case(True, **FULL),
    "recompute_activation_function": case(True),
    "recompute_activation_function_num_layers": case(2, recompute_activation_function=True),
    "recompute_norm": case(True),
    "recompute_norm_num_layers": case(2, recompute_norm=True),
    "moe_zero_memory": case("level1", before="level0", **MOE),
    "moe_zero_memory_num_layers": case(2, moe_zero_memory="level0", **MOE),
    "mla_zero_memory": case(True, **LATENT),
    "recompute_mla_up_proj": case(True, **LATENT),
    "padding_free": case(False, micro_batch_size=2, global_batch_size=8),
    "pad_to_seq_length": case(True, padding_free=False),
    "pad_to_multiple_of": case(50, reset_attention_mask=True),
    "reset_attention_mask": case(True),
    "no_shuffle": case(True),
    # memory
    "swap_attention": case(True),
    "swap_modules": case("self_attention", before="mlp", swap_attention=True),
    "swap_layer_input": case(True, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    "swap_budget": case("0.5", swap_attention=True),
    "swap_optimizer": case(True),
    "swap_optimizer_times": case(4, swap_optimizer=True),
    "reuse_fp32_param": case(True, bf16=True),
    # optimizer
    "o2_optimizer": case(True),
    "lr": case(3e-4),
    "min_lr": case(1e-6),
    "lr_decay_style": case("linear"),
    "lr_decay_iters": case(5),
    "lr_warmup_fraction": case(0.5),
    "lr_warmup_iters": case(2),
    "lr_warmup_init": case(1e-7),
    "lr_wsd_decay_style": case("linear", **WSD),
    "lr_wsd_decay_iters": case(3, **WSD),
    "optimizer_selection": case("adamw"),
    "weight_decay": case(0.2),
    "adam_beta1": case(0.8),
    "adam_beta2": case(0.95),
    "adam_eps": case(1e-6),
    "clip_grad": case(0.5),
    "loss_scale": case(8.0),
    "initial_loss_scale": case(64.0),
    "min_loss_scale": case(2.0),
    "loss_scale_window": case(10),
    "hysteresis": case(3),
    # lora
    "lora_r": case(4, before=8),
    "lora_alpha": case(4.0, lora_r=4),
    "lora_dropout": case(0.1, lora_r=4),
    "lora_target_modules": case(["q_proj", "v_proj"]),
    "lora_exclude_modules": case(["linear_fc1"], lora_r=4),
    "lora_layers_to_transform": case([0], lora_r=4),
    "lora_rank_pattern": case(["q_proj=2"], lora_target_modules=["q_proj", "v_proj"]),
    "lora_alpha_pattern": case(["linear_fc1=2"], lora_r=4),
    "use_rslora": case(True, lora_r=4),
    "use_dora": case(True, lora_r=4),
    "loraplus_lr_ratio": case(4.0, lora_r=4),
    "lora_prepack": case(True, lora_r=4, bf16=True),
    "lora_kernels": case("triton", refused="after", lora_r=4),  # no GPU here; tests/cuda runs the kernels
    "lora_load": case(["@peft"], load="@toy_llama", **NO_SHAPE),
    # checkpoint and logging
    "load": case("@toy_llama", **NO_SHAPE, hf_config="@toy_llama"),
    "save": case("@new"),
    "save_interval": case(2, save="@new"),
    "ckpt_step": case(1, load="@run", **NO_SHAPE),
    "finetune": case(True, load="@run", **NO_SHAPE),
    "allow_random_init": case(True, refused="before", load="@new"),
    "allow_change": case(["seed"], refused="before", load="@run", seed=7, **NO_SHAPE),
    "log_interval": case(2),
    "world_size": case(2, dry_run=True),
}

# Options that act only while something runs, and the test that sees it.
ELSEWHERE = {
    "memory_report": "tests/unit/plan/test_options_of_a_run.py::test_no_memory_report_leaves_it_out",
    "use_torch_fsdp2": "tests/distributed/test_fully_sharded.py::test_each_rank_holds_its_share",
    "torch_fsdp2_reshard_after_forward": (
        "tests/distributed/test_fully_sharded.py::test_layers_are_gathered_again_or_kept"
    ),
    "lora_fusion": "tests/distributed/test_lora_fusion.py::test_collectives_of_a_layer",
    "lora_fusion_chunks": "tests/distributed/test_lora_fusion.py::test_collectives_of_a_layer",
    "lora_fusion_combine": (
        "tests/unit/lora/test_fusion.py::test_small_adapters_vanish_in_bf16_only_where_they_are_combined"
    ),
    "no_load_optim": "tests/unit/plan/test_options_of_a_run.py::test_no_load_optim_forgets_the_moments",
    "no_load_rng": "tests/unit/plan/test_options_of_a_run.py::test_no_load_rng_draws_other_dropout",
    "no_save_optim": "tests/unit/plan/test_options_of_a_run.py::test_no_save_optim_cannot_be_resumed",
    "keep_last": "tests/unit/training/test_saving.py::test_keep_last_keeps_the_newest",
    "async_save": "tests/unit/plan/test_options_of_a_run.py::test_async_save_writes_the_same_in_a_thread",
    "trust_checkpoint": "tests/unit/plan/test_options_of_a_run.py::test_trust_checkpoint_admits_objects_that_run_code",
    "auto_resume": "tests/unit/training/test_saving.py::test_the_same_command_goes_on_where_it_ended",
    "load_healthy": "tests/unit/training/test_saving.py::test_the_newest_healthy_one_can_be_resumed",
    "verify_checkpoint": "tests/unit/training/test_saving.py::test_verify_checkpoint_save_reads_everything_back",
    "save_hf": "tests/unit/plan/test_options_of_a_run.py::test_save_hf_writes_what_was_trained",
    "save_hf_each_checkpoint": (
        "tests/unit/plan/test_options_of_a_run.py::test_save_hf_each_checkpoint_renews_the_export_beside_training"
    ),
    "qlora": "tests/unit/lora/test_quantized.py::test_a_run_records_its_base_in_nf4_and_resumes_on_it",
    "qlora_merge_base": "tests/unit/lora/test_quantized.py::test_merging_into_either_base",
    "show_samples": "tests/unit/plan/test_options_of_a_run.py::test_show_samples_prints_rows",
    "progress": "tests/unit/plan/test_options_of_a_run.py::test_progress_is_a_bar_or_lines",
    "log_throughput": "tests/unit/plan/test_options_of_a_run.py::test_log_throughput_adds_to_the_line",
    "hub": "tests/unit/cli/test_hub_names.py::test_the_hub_is_the_one_asked_for",
    "dry_run": "tests/unit/training/test_runs.py::test_dry_run_shows_the_plan_and_starts_nothing",
    "check_rank": "tests/unit/plan/test_scale.py::test_a_rank_of_a_large_run_is_built_and_stepped_here",
    "loss_curve": "tests/unit/training/test_runs.py::test_a_loss_curve_and_tensorboard_are_written",
    "tensorboard_dir": "tests/unit/training/test_runs.py::test_a_loss_curve_and_tensorboard_are_written",
    "metrics_jsonl": "tests/unit/training/test_monitor_sinks.py::test_the_metrics_file_stands_where_it_is_asked_for",
    "wandb_project": "tests/unit/training/test_monitor_sinks.py::test_all_sinks_get_the_same_figures",
    "wandb_exp_name": "tests/unit/training/test_monitor_sinks.py::test_all_sinks_get_the_same_figures",
    "wandb_entity": "tests/unit/training/test_monitor_sinks.py::test_all_sinks_get_the_same_figures",
    "wandb_save_dir": "tests/unit/training/test_monitor_sinks.py::test_all_sinks_get_the_same_figures",
    "swanlab_project": "tests/unit/training/test_monitor_sinks.py::test_all_sinks_get_the_same_figures",
    "swanlab_exp_name": "tests/unit/training/test_monitor_sinks.py::test_all_sinks_get_the_same_figures",
    "swanlab_workspace": "tests/unit/training/test_monitor_sinks.py::test_all_sinks_get_the_same_figures",
    "swanlab_save_dir": "tests/unit/training/test_monitor_sinks.py::test_all_sinks_get_the_same_figures",
    "log_memory": "tests/unit/training/test_monitor.py::test_memory_is_in_the_log_line_on_request",
    "log_params_norm": "tests/unit/training/test_monitor.py::test_norms_are_in_the_log_line_on_request",
    "log_num_zeros_in_grad": "tests/unit/training/test_monitor.py::test_norms_are_in_the_log_line_on_request",
    "log_layer_norms": "tests/distributed/test_monitor.py::test_figures_are_those_of_one_process",
    "log_local_norms": "tests/distributed/test_monitor.py::test_local_losses_are_those_of_the_replicas_rows",
    "log_expert_load": "tests/distributed/test_monitor.py::test_figures_are_those_of_one_process",
    "log_max_attention_logit": "tests/distributed/test_monitor.py::test_figures_are_those_of_one_process",
    "log_timing": "tests/distributed/test_monitor.py::test_a_slow_rank_is_named",
    "straggler_threshold": "tests/distributed/test_monitor.py::test_a_slow_rank_is_named",
    "straggler_window": "tests/distributed/test_monitor.py::test_a_slow_rank_is_named",
    **dict.fromkeys(
        ("profile", "profile_step_start", "profile_step_end"),
        "tests/unit/training/test_profiling.py::test_iterations_between_start_and_end_are_traced",
    ),
    "profile_ranks": "tests/unit/training/test_profiling.py::test_other_ranks_and_other_iterations_are_not_traced",
    **dict.fromkeys(
        ("profile_save_path", "profile_with_stack", "profile_with_memory", "profile_record_shapes"),
        "tests/unit/training/test_profiling.py::test_a_trace_lies_in_profile_save_path_and_holds_what_is_asked_for",
    ),
    "profile_with_cpu": "tests/unit/training/test_profiling.py::test_the_host_of_a_gpu_is_traced_with_profile_with_cpu",
    **dict.fromkeys(
        ("profile_level", "profile_export_type", "profile_data_simplification"),
        "tests/ascend/cases/test_profiling.py::test_every_option_reaches_torch_npus_profiler",
    ),
    "on_nonfinite": "tests/distributed/test_guards.py::test_a_run_that_leaves_a_batch_out_is_the_run_without_it",
    "grad_norm_spike_threshold": "tests/distributed/test_guards.py::test_a_spike_is_left_out_or_said",
    "loss_spike_threshold": "tests/distributed/test_guards.py::test_a_spike_of_the_loss_is_said_too",
    "spike_window": "tests/distributed/test_guards.py::test_a_spike_is_left_out_or_said",
    "spike_count": "tests/distributed/test_guards.py::test_a_spike_makes_a_checkpoint_unhealthy_and_a_rewind_passes_it",
    "spike_action": "tests/distributed/test_guards.py::test_a_spike_is_left_out_or_said",
    "check_weight_hash_across_dp_replicas_interval": (
        "tests/distributed/test_guards.py::test_a_flipped_bit_of_one_replica_is_named"
    ),
    "replay_batch_interval": (
        "tests/distributed/test_guards.py::test_a_gradient_that_differs_the_second_time_is_noticed"
    ),
    "embedding_local_norm_threshold": (
        "tests/distributed/test_guards.py::test_a_large_gradient_of_the_embedding_marks_a_checkpoint"
    ),
}
DOORS = ("pretrain", "posttrain")
OPTIONS = [(door, o.name) for door in DOORS for o in door_options(door)]
# What several doors have is tried at each of them, and at the first one in the short suite.
PERTURBED = [
    pytest.param(door, name, marks=() if name not in {n for _, n in OPTIONS[:i]} else pytest.mark.slow)
    for i, (door, name) in enumerate(OPTIONS)
    if name in CASES
]


def test_no_option_is_forgotten_or_listed_twice():
    assert set(CASES) & set(ELSEWHERE) == set()
    assert {name for _, name in OPTIONS} == set(CASES) | set(ELSEWHERE)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_other_tests_exist(name):
    file, test = ELSEWHERE[name].split("::")
    text = (ROOT / file).read_text()
    assert f"def {test}(" in text
    assert name in text or name.replace("_", "-") in text


@pytest.fixture(scope="module")
def places(toy_llama, toy_qwen, rows, tmp_path_factory):
    """What "@name" stands for."""
    from mindspeed_llm.models.hf_config import read_hf_config, shape_from_hf

    root = tmp_path_factory.mktemp("places")
    made = {name: root / name for name in ("other_rows", "templates", "hf_params", "strange", "peft", "new")}
    made |= {f"run of {door}": root / door for door in ("pretrain", "posttrain")}
    made |= {"cache": root / "cache", "rows": rows, "toy_llama": toy_llama, "toy_qwen": toy_qwen}
    made["other_rows"] = root / "other_rows.json"
    made["other_rows"].write_text(rows.read_text())
    made["templates"].write_text((ROOT / "mindspeed_llm/data/templates.yaml").read_text() + "\n# mine\n")
    made["hf_params"].write_text(json.dumps({"name": "main"}))
    made["strange"].mkdir()
    config = json.loads((toy_llama / "config.json").read_text())
    (made["strange"] / "config.json").write_text(json.dumps({**config, "strange_field": 1}))
    made["peft"].mkdir()
    peft = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (made["peft"] / "adapter_config.json").write_text(json.dumps(peft))
    save_file({}, made["peft"] / "adapter_model.safetensors")  # a plan reads the settings alone
    record = {
        "format": "torch_dist", "resumable": True, "shape": shape_from_hf(read_hf_config(toy_llama)).to_json(),
        "adapters": None, "continuity": {"seed": 1234},
    }  # fmt: skip
    for door, step in itertools.product(("pretrain", "posttrain"), (1, 2)):
        directory = made[f"run of {door}"] / f"iter_{step:07d}"
        directory.mkdir(parents=True)
        (directory / ".metadata").write_bytes(b"")
        progress = {"iteration": step, "consumed_samples": 4 * step}
        continuity = record["continuity"] | ({"stage": "sft"} if door == "posttrain" else {})
        (directory / "mindspeed_llm.json").write_text(
            json.dumps({**record, "continuity": continuity, "iteration": step, "progress": progress})
        )
        (directory.parent / "latest_checkpointed_iteration.txt").write_text("2")
    return made


def spelled(options, places):
    """The command line for {option: value}."""
    words = []
    for name, value in options.items():
        o = all_options()[name]
        if value is ABSENT:
            continue
        if o.scalar is bool:
            words.append(o.flags[0] if value else o.off_flags[0])
            continue
        values = value if isinstance(value, list) else [value]
        values = [str(places[v[1:]]) if isinstance(v, str) and v.startswith("@") else v for v in values]
        words += [o.flags[0], *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return words


class Recorder:
    """Stands for what would start processes or build big things; remembers what it was told."""

    def __init__(self, monkeypatch, toy):
        from mindspeed_llm import accelerator
        from mindspeed_llm.data.tokenizer import load_tokenizer

        self.calls: list[str] = []
        stands = types.SimpleNamespace(print=lambda: None)
        tokenizer = load_tokenizer(str(toy))
        for target, result in {
            "mindspeed_llm.parallel.setup.initialize_distributed": None,
            "mindspeed_llm.data.cache.preprocess_input": stands,
            "mindspeed_llm.cli.training.load_tokenizer": tokenizer,
            "megatron.core.optimizer.get_megatron_optimizer": types.SimpleNamespace(scale_loss=0, optimizer=None),
            "mindspeed_llm.training.optimizer.make_in_form": types.SimpleNamespace(scale_loss=0, chained_optimizers=()),
            "megatron.core.optimizer_param_scheduler.OptimizerParamScheduler": "scheduler",
            "megatron.core.distributed.DistributedDataParallel": types.SimpleNamespace(
                no_sync=0, module=stub_model(0), param_to_bucket_group=collections.defaultdict(int)
            ),
            "torch.set_num_threads": None,
            "mindspeed_llm.accelerator.host_allocator.keep_freed_memory": None,
        }.items():
            monkeypatch.setattr(target, self.stand_in(target.rsplit(".", 1)[-1], result))
        monkeypatch.setattr(accelerator, "select", self.stand_in("select", None))

    def stand_in(self, name, result):
        def call(*arguments, **keywords):
            plain = [a for a in arguments if not isinstance(a, torch.nn.Module | list)]
            self.calls.append(re.sub(r" at 0x\w+", "", f"{name} {plain} {sorted(keywords.items())}"))
            return result

        return call


class OneProcess:
    """What choosing what is trained, and saying when to save, ask of torch.distributed."""

    def is_initialized(self):
        return True

    def get_rank(self):
        return 0

    def get_world_size(self):
        return 1

    def all_gather_object(self, found, mine):
        found[0] = mine


def stub_model(num_layers):
    """Parameters with a model's names."""
    chunk = torch.nn.Module()
    chunk.config = types.SimpleNamespace(accumulate_weight_gradients=True)
    chunk.embedding = torch.nn.Linear(1, 1)
    chunk.decoder = torch.nn.Module()
    layers = [torch.nn.ModuleDict({"linear_fc1": torch.nn.Linear(1, 1)}) for _ in range(num_layers)]
    chunk.decoder.layers = torch.nn.ModuleList(layers)
    return chunk


def loop_events(plan, data, train_iters):
    """What the training loop does, and after which iterations."""
    from mindspeed_llm.training.loop import Progress, TrainingLoop
    from mindspeed_llm.training.saving import SaveSchedule

    events = []
    minutes = iter(range(100))
    schedule = SaveSchedule(plan.config, clock=lambda: 60.0 * next(minutes))

    class Quiet(TrainingLoop):
        def step(self):
            self.progress.iteration += 1
            schedule.after_backward(self, types.SimpleNamespace(flags=schedule.flags()))
            return types.SimpleNamespace(tokens=1, trained_tokens=1, loss=1.0, further_losses={}), 1.0

        def flops(self, result):
            return 0.0

        def log(self, interval, grad_norm):
            events.append(("log", self.progress.iteration))

        def evaluate(self):
            events.append(("evaluate", self.progress.iteration, self.eval_iters))

    def save(progress):
        events.append(("save", progress.iteration))

    asked_to_save = save if plan.config.checkpoint.save else None
    Quiet(plan, None, None, None, data, None, Progress(), train_iters, asked_to_save, [schedule]).run()
    return events


def observe(door, options, places, prefix, recorder, monkeypatch, capsys):
    """(whether it was refused, everything that a run would derive from the options)."""
    from mindspeed_llm.cli import training as training_door
    from mindspeed_llm.ops import registry
    from mindspeed_llm.plan.plan import resolve
    from mindspeed_llm.plan.show import show_plan
    from mindspeed_llm.training import setup
    from mindspeed_llm.training.data import TrainingData
    from mindspeed_llm.training.length import train_iterations
    from mindspeed_llm.training.run import make_optimizer, takes_signals, watch_settings

    recorder.calls.clear()
    parsed = parse(door, spelled(options, places))
    try:
        plan = resolve(parsed.config, parsed.problems)
    except UserError as wrong:
        return True, {"refused": str(wrong)}
    capsys.readouterr()
    show_plan(plan)
    seen = {f.name: repr(getattr(plan, f.name)) for f in fields(plan) if f.name != "config"}
    seen["shown"] = capsys.readouterr().out
    seen["watch"] = repr((takes_signals(plan), watch_settings(plan)))
    seen["build options"] = repr(setup.build_options(plan, initialize=False))
    setup.start_processes(plan)
    seen["operators"] = repr(registry.chosen())
    training_door.prepare_data(plan, training_door.tokenizer_of(plan))
    monkeypatch.setattr(setup, "dist", OneProcess())
    chunk = stub_model(len(plan.layout.layers.built_layers(0)))
    seen["trained"] = repr((setup.choose_trained(plan, [chunk]), [p.requires_grad for p in chunk.parameters()]))
    setup.wrap(plan, [chunk])
    seen["hooks"] = repr(sorted(vars(chunk.config)))
    data = TrainingData(plan, [prefix], 0)
    t = plan.config.training
    if t.eval_only:
        return False, seen | {"calls": recorder.calls, "evaluates only": "yes"}
    iterations = train_iterations(t, plan.global_batch_size, data.samples_per_epoch)
    make_optimizer(plan, setup.TrainingModel([chunk], [chunk], []), iterations)
    seen["batches"] = repr([vars(batch) for batch in data.micro_batches(0, 0)])
    seen["loop"] = repr((iterations, loop_events(plan, data, iterations)))
    return False, seen | {"calls": list(recorder.calls)}


@pytest.mark.parametrize("door, name", PERTURBED)
def test_option_acts(door, name, places, prepared, toy_llama, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    recorder = Recorder(monkeypatch, toy_llama)
    places = {**places, "run": places.get(f"run of {door}")}
    base = {**SHAPE, "train_iters": 6, "tokenizer_name_or_path": "@toy_llama", "seq_length": 128}
    base |= {"data_path": ["@rows"], "global_batch_size": 4, "split": "80,20"}
    chosen = CASES[name]
    base |= chosen.around
    before = base.get(name, ABSENT) if chosen.before is ABSENT else chosen.before
    sides = {}
    for side, value in (("before", before), ("after", chosen.after)):
        sides[side] = observe(door, {**base, name: value}, places, prepared[door], recorder, monkeypatch, capsys)
        assert sides[side][0] == (chosen.refused == side), sides[side][1]
    if not chosen.refused:
        differing = [key for key in sides["before"][1] if sides["before"][1][key] != sides["after"][1].get(key)]
        assert differing, f"{name} changes nothing"


def test_an_option_that_does_nothing_would_be_noticed(places, prepared, toy_llama, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    recorder = Recorder(monkeypatch, toy_llama)
    base = {**SHAPE, "train_iters": 6, "tokenizer_name_or_path": "@toy_llama", "data_path": ["@rows"]}
    one, other = (
        observe("pretrain", {**base, **more}, places, prepared["pretrain"], recorder, monkeypatch, capsys)
        for more in ({}, {"show_samples": 3})
    )
    assert {k for k in one[1] if one[1][k] != other[1][k]} == set()
    assert not one[0] and len(one[1]) > 15
