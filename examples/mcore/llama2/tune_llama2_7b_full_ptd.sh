#!/usr/bin/env bash
# Fine-tuning of all weights on instructions.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

DATA_PATH=${DATA_PATH:-./finetune_dataset/alpaca}
CKPT_LOAD_DIR=${CKPT_LOAD_DIR:-./model_weights/Llama2-mcore/}
CKPT_SAVE_DIR=${CKPT_SAVE_DIR:-./ckpt/}
NPROC_PER_NODE=${NPROC_PER_NODE:-8}
TP=${TP:-8}
PP=${PP:-1}

run_ranks posttrain_gpt.py \
    --stage sft \
    --finetune \
    --load "$CKPT_LOAD_DIR" \
    --tokenizer-name-or-path "$TOKENIZER" \
    --prompt-type llama2 \
    --data-path "$DATA_PATH" \
    --split 100,0,0 \
    --eval-iters 0 \
    --save "$CKPT_SAVE_DIR" \
    --save-interval "${SAVE_INTERVAL:-500}" \
    --keep-last "${KEEP_LAST:-2}" \
    --auto-resume \
    --tensor-model-parallel-size "$TP" \
    --pipeline-model-parallel-size "$PP" \
    --sequence-parallel \
    --seq-length "${SEQ_LENGTH:-4096}" \
    --micro-batch-size "${MBS:-4}" \
    --global-batch-size "${GBS:-128}" \
    --train-iters "${TRAIN_ITERS:-2000}" \
    --lr "${LR:-5e-5}" \
    --min-lr "${MIN_LR:-1.25e-7}" \
    --lr-warmup-fraction 0.01 \
    --weight-decay 0.1 \
    --adam-beta2 0.95 \
    ${DTYPE_FLAG:+"$DTYPE_FLAG"} \
    "$@"
