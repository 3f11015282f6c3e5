#!/usr/bin/env bash
# A Megatron or training checkpoint to a Hugging Face directory. SAVE_DIR holds the original Hugging Face model: the
# result goes into its mg2hf/. With CHECKPOINT_LORA the adapters there are merged into the weights.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

LOAD_DIR=${LOAD_DIR:-./model_weights/Llama2-mcore/}
SAVE_DIR=${SAVE_DIR:-./model_from_hf/llama-2-7b-hf/}

run_one convert_ckpt.py \
    --load-model-type mg \
    --save-model-type hf \
    --load-dir "$LOAD_DIR" \
    --save-dir "$SAVE_DIR" \
    ${CHECKPOINT_LORA:+--lora-load "$CHECKPOINT_LORA"} \
    "$@"
