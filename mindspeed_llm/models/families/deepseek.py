"""DeepSeek-V2, V2-Lite and V3 (also R1 and others of that architecture): latent attention, experts, prediction.

Source: transformers' DeepseekV2Config, DeepseekV3Config and their modelling files; defaults are theirs. Names of the
multi-token prediction layers, which transformers does not load, are those of the published files.
"""

import dataclasses

from mindspeed_llm.models.families.llama import ATTENTION, COMMON_FIELDS, HF_LAYER, MLP, TENSORS
from mindspeed_llm.models.families.qwen_moe import HF_MLP, SHARED, expert_tensors
from mindspeed_llm.models.family import ConfigField, Family, SameAs, Sum, TensorRule, Variant

HF_ATTENTION = HF_LAYER + "self_attn."
HAS_SHARED = "moe_shared_expert_intermediate_size"

FIELDS = {
    **{name: rule for name, rule in COMMON_FIELDS.items() if name != "head_dim"},
    "q_lora_rank": ConfigField(("q_lora_rank",), default=1536, null=None),
    "kv_lora_rank": ConfigField(("kv_lora_rank",), default=512),
    "qk_nope_head_dim": ConfigField(("qk_head_dim",), default=128),
    "qk_rope_head_dim": ConfigField(("qk_pos_emb_head_dim",), default=64),
    "v_head_dim": ConfigField(("v_head_dim",), default=128),
    # transformers writes two sizes that follow from the others
    "qk_head_dim": ConfigField(("kv_channels",), default=Sum("qk_head_dim", "qk_pos_emb_head_dim")),
    "head_dim": ConfigField(("qk_pos_emb_head_dim",), default=SameAs("qk_pos_emb_head_dim")),
    "attention_bias": ConfigField((), default=False, legal={False: False}),
    "n_routed_experts": ConfigField(("num_moe_experts",), null=None, aliases=("num_experts", "num_local_experts")),
    "norm_topk_prob": ConfigField(("norm_topk_prob",), default=False),
    "routed_scaling_factor": ConfigField(("moe_router_topk_scaling_factor",), default=1.0),
    "n_group": ConfigField(("moe_router_num_groups",), default=None, null=None),
    "topk_group": ConfigField(("moe_router_group_topk",), default=None, null=None),
}

CONSTANTS = {
    "multi_latent_attention": True,
    # the latents' norms keep the default of the norm class, whatever rms_norm_eps is
    "latent_norm_epsilon": 1e-6,
    "moe_router_pre_softmax": True,
}

V2 = Variant(
    model_type="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    fields={
        **FIELDS,
        "n_routed_experts": dataclasses.replace(FIELDS["n_routed_experts"], default=64),
        "num_experts_per_tok": ConfigField(("moe_router_topk",)),
        "moe_intermediate_size": ConfigField(("moe_ffn_hidden_size",), default=1407),
        # not divided by their sum, whatever the field says in transformers; the published models say false
        "norm_topk_prob": ConfigField(("norm_topk_prob",), default=False, legal={False: False}),
        "scoring_func": ConfigField(("moe_router_score_function",), default="softmax", legal={"softmax": "softmax"}),
        "topk_method": ConfigField(
            (), default="greedy", legal={"greedy": "greedy", "group_limited_greedy": "group_limited_greedy"}
        ),
        "mlp_bias": ConfigField((), default=False, legal={False: False}),
    },
    constants={**CONSTANTS, "rotary_interleaved": True, "moe_router_group_score_topk": 1},
    experts="first_dense",
    expert_defaults={"topk_method": "greedy", "n_shared_experts": 2, "first_k_dense_replace": 0},
)

V3 = Variant(
    model_type="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    fields={
        **FIELDS,
        "num_key_value_heads": ConfigField(("num_query_groups",), default=128, null=SameAs("num_attention_heads")),
        "max_position_embeddings": ConfigField(("max_position_embeddings",), default=4096),
        "rope_interleave": ConfigField(("rotary_interleaved",), default=True),
        "n_routed_experts": dataclasses.replace(FIELDS["n_routed_experts"], default=256),
        "num_experts_per_tok": ConfigField(("moe_router_topk",), default=8),
        "moe_intermediate_size": ConfigField(("moe_ffn_hidden_size",), default=2048),
        "norm_topk_prob": ConfigField(("norm_topk_prob",), default=True),
        "routed_scaling_factor": ConfigField(("moe_router_topk_scaling_factor",), default=2.5),
        "scoring_func": ConfigField(("moe_router_score_function",), default="sigmoid", legal={"sigmoid": "sigmoid"}),
        "topk_method": ConfigField((), default="noaux_tc", legal={"noaux_tc": "noaux_tc"}),
        "n_group": ConfigField(("moe_router_num_groups",), default=8),
        "topk_group": ConfigField(("moe_router_group_topk",), default=4),
        # Files without the field hold no such layers; transformers' default of 1 says only how many it would look for.
        "num_nextn_predict_layers": ConfigField(("mtp_num_layers",), default=0, null=0, aliases=("num_mtp_layers",)),
    },
    constants={**CONSTANTS, "moe_router_group_score_topk": 2, "moe_router_enable_expert_bias": True},
    experts="first_dense",
    expert_defaults={"n_shared_experts": 1, "first_k_dense_replace": 3},
)

LATENT_ATTENTION = (
    TensorRule(ATTENTION + "linear_q_proj.weight", (HF_ATTENTION + "q_proj.weight",), when="not q_lora_rank"),
    TensorRule(ATTENTION + "linear_q_down_proj.weight", (HF_ATTENTION + "q_a_proj.weight",), when="q_lora_rank"),
    TensorRule(ATTENTION + "q_layernorm.weight", (HF_ATTENTION + "q_a_layernorm.weight",), when="q_lora_rank"),
    TensorRule(ATTENTION + "linear_q_up_proj.weight", (HF_ATTENTION + "q_b_proj.weight",), when="q_lora_rank"),
    TensorRule(ATTENTION + "linear_kv_down_proj.weight", (HF_ATTENTION + "kv_a_proj_with_mqa.weight",)),
    TensorRule(ATTENTION + "kv_layernorm.weight", (HF_ATTENTION + "kv_a_layernorm.weight",)),
    TensorRule(ATTENTION + "linear_kv_up_proj.weight", (HF_ATTENTION + "kv_b_proj.weight",)),
    TensorRule(ATTENTION + "linear_proj.weight", (HF_ATTENTION + "o_proj.weight",)),
)

EXPERTS = (
    *expert_tensors(HF_MLP),
    TensorRule(
        MLP + "router.expert_bias",
        (HF_MLP + "gate.e_score_correction_bias",),
        when="moe_router_enable_expert_bias",
        layers="moe",
    ),
    TensorRule(
        SHARED + "linear_fc1.weight",
        (HF_MLP + "shared_experts.gate_proj.weight", HF_MLP + "shared_experts.up_proj.weight"),
        "parts",
        HAS_SHARED,
        "moe",
    ),
    TensorRule(
        SHARED + "linear_fc2.weight", (HF_MLP + "shared_experts.down_proj.weight",), when=HAS_SHARED, layers="moe"
    ),
)

PREDICTION = tuple(
    TensorRule(f"mtp.layers.{{m}}.{name}.weight", (f"{HF_LAYER}{hf}.weight",), layers="mtp")
    for name, hf in (
        ("enorm", "enorm"),
        ("hnorm", "hnorm"),
        ("eh_proj", "eh_proj"),
        ("final_layernorm", "shared_head.norm"),
    )
)

FAMILY = Family(
    name="deepseek",
    variants=(V2, V3),
    tensors=(
        *(rule for rule in TENSORS if not rule.mcore.startswith((ATTENTION, MLP))),
        *LATENT_ATTENTION,
        *(dataclasses.replace(rule, layers="dense") for rule in TENSORS if rule.mcore.startswith(MLP)),
        *EXPERTS,
        *PREDICTION,
    ),
    ignored_fields=frozenset(
        # execution: how many ranks share the experts, how matmuls are split
        "ep_size pretraining_tp "
        # which file of the repository has the class; transformers has it too
        "auto_map "
        # losses of HF's own training; here --moe-aux-loss-coeff says so
        "aux_loss_alpha seq_aux output_router_logits router_aux_loss_coef".split()
    ),
    optional_tensors=(HF_ATTENTION + "rotary_emb.inv_freq",),
    mtp_copies=(
        (HF_LAYER + "embed_tokens.weight", "embedding.word_embeddings.weight"),
        (HF_LAYER + "shared_head.head.weight", "output_layer.weight"),
    ),
)
