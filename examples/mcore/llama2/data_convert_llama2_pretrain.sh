#!/usr/bin/env bash
# Text rows (column `text`) to OUTPUT_PREFIX_text_document.bin/.idx for pre-training.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

INPUT=${INPUT:-./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet}
OUTPUT_PREFIX=${OUTPUT_PREFIX:-./dataset/alpaca}
WORKERS=${WORKERS:-4}

run_one preprocess_data.py \
    --input "$INPUT" \
    --tokenizer-name-or-path "$TOKENIZER" \
    --handler-name GeneralPretrainHandler \
    --json-keys text \
    --output-prefix "$OUTPUT_PREFIX" \
    --workers "$WORKERS" \
    "$@"
