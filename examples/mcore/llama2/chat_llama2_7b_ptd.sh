#!/usr/bin/env bash
# Chat on the terminal; q, quit or exit ends it, clear or new forgets the conversation.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

CHECKPOINT=${CHECKPOINT:-./model_weights/Llama2-mcore/}
NPROC_PER_NODE=${NPROC_PER_NODE:-1}
TP=${TP:-1}
PP=${PP:-1}
MAX_RESTARTS=${MAX_RESTARTS:-0}

run_ranks inference.py \
    --task chat \
    --load "$CHECKPOINT" \
    --tokenizer-name-or-path "$TOKENIZER" \
    --prompt-type llama2 \
    --tensor-model-parallel-size "$TP" \
    --pipeline-model-parallel-size "$PP" \
    --max-new-tokens "${MAX_NEW_TOKENS:-256}" \
    --top-p 0.6 \
    --temperature 0.9 \
    ${DTYPE_FLAG:+"$DTYPE_FLAG"} \
    "$@"
