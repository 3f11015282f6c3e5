#!/usr/bin/env bash
# Alpaca rows (instruction, input, output) to OUTPUT_PREFIX_packed_*_document.bin/.idx for fine-tuning.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

INPUT=${INPUT:-./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet}
OUTPUT_PREFIX=${OUTPUT_PREFIX:-./finetune_dataset/alpaca}
WORKERS=${WORKERS:-4}

run_one preprocess_data.py \
    --input "$INPUT" \
    --tokenizer-name-or-path "$TOKENIZER" \
    --handler-name AlpacaStyleInstructionHandler \
    --prompt-type llama2 \
    --output-prefix "$OUTPUT_PREFIX" \
    --workers "$WORKERS" \
    "$@"
