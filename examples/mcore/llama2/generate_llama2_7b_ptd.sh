#!/usr/bin/env bash
# Answers from a base model: greedy, sampling, beam search, then a chat (or what --task and --prompt ask for).
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

CHECKPOINT=${CHECKPOINT:-./model_weights/Llama2-mcore/}
NPROC_PER_NODE=${NPROC_PER_NODE:-1}
TP=${TP:-1}
PP=${PP:-1}
MAX_RESTARTS=${MAX_RESTARTS:-0}

run_ranks inference.py \
    --load "$CHECKPOINT" \
    --tokenizer-name-or-path "$TOKENIZER" \
    --tensor-model-parallel-size "$TP" \
    --pipeline-model-parallel-size "$PP" \
    --max-new-tokens "${MAX_NEW_TOKENS:-256}" \
    ${DTYPE_FLAG:+"$DTYPE_FLAG"} \
    "$@"
