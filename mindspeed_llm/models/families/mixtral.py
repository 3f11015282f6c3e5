"""Mixtral: Mistral's attention, and experts in every layer.

Source: transformers' MixtralConfig and its modelling file; defaults are theirs. Tensor names are those on the hub
(`block_sparse_moe`, w1 gate, w2 down, w3 up).
"""

from mindspeed_llm.models.families.llama import COMMON_FIELDS, HF_LAYER, MLP, TENSORS
from mindspeed_llm.models.family import ConfigField, Family, SameAs, TensorRule, Variant

EXPERT = MLP + "experts.local_experts.{e}."
HF_MOE = HF_LAYER + "block_sparse_moe."

MIXTRAL = Variant(
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    fields={
        **COMMON_FIELDS,
        "intermediate_size": ConfigField(("ffn_hidden_size", "moe_ffn_hidden_size")),
        "num_key_value_heads": ConfigField(("num_query_groups",), default=8, null=SameAs("num_attention_heads")),
        "max_position_embeddings": ConfigField(("max_position_embeddings",), default=131072),
        "rms_norm_eps": ConfigField(("norm_epsilon",), default=1e-5),
        "num_local_experts": ConfigField(("num_moe_experts",), default=8, aliases=("num_experts",)),
        "num_experts_per_tok": ConfigField(("moe_router_topk",), default=2),
        # noise on the router's input while training; published configs have none
        "router_jitter_noise": ConfigField((), default=0.0, legal={0.0: 0.0}),
    },
    # HF divides the chosen probabilities by their sum, which is the softmax over the chosen ones
    constants={"moe_router_pre_softmax": True, "norm_topk_prob": True},
    rope_theta=1e6,
    sliding_window="every_layer",
    sliding_window_default=None,
    experts="every_layer",
)

FAMILY = Family(
    name="mixtral",
    variants=(MIXTRAL,),
    tensors=(
        *(rule for rule in TENSORS if not rule.mcore.startswith(MLP)),
        TensorRule(MLP + "router.weight", (HF_MOE + "gate.weight",)),
        TensorRule(
            EXPERT + "linear_fc1.weight",
            (HF_MOE + "experts.{e}.w1.weight", HF_MOE + "experts.{e}.w3.weight"),
            "parts",
        ),
        TensorRule(EXPERT + "linear_fc2.weight", (HF_MOE + "experts.{e}.w2.weight",)),
    ),
    # what HF adds to its own training loss; here --moe-aux-loss-coeff says so
    ignored_fields=frozenset({"router_aux_loss_coef", "output_router_logits"}),
)
