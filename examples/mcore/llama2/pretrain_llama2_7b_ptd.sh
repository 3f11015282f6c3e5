#!/usr/bin/env bash
# Pre-training. It starts from the weights in CKPT_LOAD_DIR; with CKPT_LOAD_DIR= (empty) from random weights in the
# shape of the config.json beside the tokenizer.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

DATA_PATH=${DATA_PATH:-./dataset/alpaca_text_document}
CKPT_LOAD_DIR=${CKPT_LOAD_DIR-./model_weights/Llama2-mcore/}
CKPT_SAVE_DIR=${CKPT_SAVE_DIR:-./ckpt/}
NPROC_PER_NODE=${NPROC_PER_NODE:-8}
TP=${TP:-1}
PP=${PP:-2}

WEIGHTS=(--hf-config "$TOKENIZER")
if [[ -n $CKPT_LOAD_DIR ]]; then WEIGHTS=(--load "$CKPT_LOAD_DIR"); fi

run_ranks pretrain_gpt.py \
    "${WEIGHTS[@]}" \
    --tokenizer-name-or-path "$TOKENIZER" \
    --data-path "$DATA_PATH" \
    --save "$CKPT_SAVE_DIR" \
    --save-interval "${SAVE_INTERVAL:-1000}" \
    --keep-last "${KEEP_LAST:-2}" \
    --auto-resume \
    --tensor-model-parallel-size "$TP" \
    --pipeline-model-parallel-size "$PP" \
    --sequence-parallel \
    --use-distributed-optimizer \
    --overlap-grad-reduce \
    --seq-length "${SEQ_LENGTH:-4096}" \
    --micro-batch-size "${MBS:-1}" \
    --global-batch-size "${GBS:-256}" \
    --train-iters "${TRAIN_ITERS:-5000}" \
    --lr "${LR:-1.25e-6}" \
    --min-lr "${MIN_LR:-1.25e-7}" \
    --lr-warmup-fraction 0.01 \
    --weight-decay 0.1 \
    --adam-beta2 0.95 \
    --eval-interval 1000 \
    ${DTYPE_FLAG:+"$DTYPE_FLAG"} \
    "$@"
