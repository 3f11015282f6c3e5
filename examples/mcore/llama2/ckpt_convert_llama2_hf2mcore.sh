#!/usr/bin/env bash
# A Hugging Face directory to Megatron's mp_rank_XX files for TP x PP processes.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

LOAD_DIR=${LOAD_DIR:-./model_from_hf/llama-2-7b-hf/}
SAVE_DIR=${SAVE_DIR:-./model_weights/Llama2-mcore/}
TP=${TP:-8}
PP=${PP:-1}

run_one convert_ckpt.py \
    --load-model-type hf \
    --save-model-type mg \
    --load-dir "$LOAD_DIR" \
    --save-dir "$SAVE_DIR" \
    --target-tensor-parallel-size "$TP" \
    --target-pipeline-parallel-size "$PP" \
    "$@"
