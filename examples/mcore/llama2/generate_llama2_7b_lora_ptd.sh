#!/usr/bin/env bash
# Answers from a base model with the adapters in CHECKPOINT_LORA; without --task it ends in a chat (`You >>`).
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

CHECKPOINT=${CHECKPOINT:-./model_weights/Llama2-mcore/}
CHECKPOINT_LORA=${CHECKPOINT_LORA:-./ckpt/}
NPROC_PER_NODE=${NPROC_PER_NODE:-8}
TP=${TP:-8}
PP=${PP:-1}
MAX_RESTARTS=${MAX_RESTARTS:-0}

run_ranks inference.py \
    --load "$CHECKPOINT" \
    --lora-load "$CHECKPOINT_LORA" \
    --tokenizer-name-or-path "$TOKENIZER" \
    --prompt-type llama2 \
    --tensor-model-parallel-size "$TP" \
    --pipeline-model-parallel-size "$PP" \
    --max-new-tokens "${MAX_NEW_TOKENS:-256}" \
    ${DTYPE_FLAG:+"$DTYPE_FLAG"} \
    "$@"
