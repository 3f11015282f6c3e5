#!/usr/bin/env bash
# From nothing to a tuned model that answers: installs, then runs the whole job on real text with a small Llama, through
# the recipes of examples/mcore/llama2/. Ends with a verdict; the exit status is not 0 unless the tuned model is clearly
# better than its base.
#   QUICKSTART_DIR   where everything goes (default: ./quickstart_output; replaced when it is from an earlier run)
#   PRETRAIN_ITERS, TUNE_ITERS, HIDDEN_SIZE, NUM_LAYERS   sizes
#   SHUFFLE_ANSWERS=1   the control: trains on answers that do not belong to their questions, and must fail
#   VENV, BASE_PYTHON, TORCH_INDEX_URL   see scripts/environment.sh; without an accelerator:
#                    TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu bash quickstart.sh
# shellcheck disable=SC2329  # stage() calls the functions
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh

OUT=${QUICKSTART_DIR:-$PWD/quickstart_output}
RECIPES=examples/mcore/llama2
MARK=$OUT/.made-by-quickstart

fresh_directory() {
    if [[ -e $OUT && ! -e $MARK && -n $(ls -A "$OUT") ]]; then
        echo "error: QUICKSTART_DIR: $OUT holds other files; legal: a new directory or one from an earlier run" >&2
        exit 1
    fi
    rm -rf "$OUT"
    mkdir -p "$OUT"
    touch "$MARK"
    OUT=$(cd "$OUT" && pwd)
}

# stage NAME COMMAND...: run it and note its seconds.
stage() {
    local name=$1 start status
    start=$(date +%s.%N)
    shift
    printf '\n\e[1m== %s\e[0m\n' "$name"
    "$@"
    status=$?
    printf '%s\t= %s\n' "$(seconds_since "$start")" "$name" >>"$STAGES"
    return "$status"
}

seconds_since() { awk -v a="$1" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }'; }

# Log lines of training as one moving line; everything else as it is. The log file has all lines.
progress() {
    local line pattern='iteration +([0-9]+)/ +([0-9]+) .*tokens per second: ([0-9]+).*lm loss: ([0-9.E+-]+)' done_of bar
    while IFS= read -r line; do
        if [[ $line =~ $pattern ]]; then
            done_of=$((40 * BASH_REMATCH[1] / BASH_REMATCH[2]))
            bar=$(printf '%*s' "$done_of" '')
            printf -v line '%-40s %s/%s  loss %.3f  %s tokens/s' \
                "${bar// /#}" "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}" "${BASH_REMATCH[4]}" "${BASH_REMATCH[3]}"
            if [[ -t 1 ]]; then
                printf '\r%s' "$line"
                ((BASH_REMATCH[1] != BASH_REMATCH[2])) || echo
            elif ((BASH_REMATCH[1] * 10 % BASH_REMATCH[2] < 10)); then
                echo "$line"
            fi
        else
            echo "$line"
        fi
    done
}

pretrain() {
    DATA_PATH=$OUT/data/corpus CKPT_LOAD_DIR='' CKPT_SAVE_DIR=$OUT/pretrained NPROC_PER_NODE=1 PP=1 \
        TRAIN_ITERS=${PRETRAIN_ITERS:-400} SEQ_LENGTH=256 MBS=8 GBS=8 LR=4e-3 MIN_LR=1e-4 \
        bash "$RECIPES"/pretrain_llama2_7b_ptd.sh --loss-curve "$OUT/loss_pretrain.png" | progress
}

# What the tuning recipe is told; also for its dry run.
settings_of_tuning() {
    export DATA_PATH=$OUT/data/instructions CKPT_LOAD_DIR=$OUT/base_mcore CKPT_SAVE_DIR=$OUT/adapters
    export NPROC_PER_NODE=2 TP=2 TRAIN_ITERS=${TUNE_ITERS:-300} SEQ_LENGTH=512 MBS=16 GBS=16 LORA_R=32 LORA_ALPHA=64
    export LR=5e-3 MIN_LR=1e-5
}

convert() {
    "$PYTHON" examples/quickstart/recipes.py \
        ckpt_convert_llama2_mcore2hf LOAD_DIR="$OUT/pretrained" SAVE_DIR="$OUT/base_hf" "then" \
        ckpt_convert_llama2_hf2mcore LOAD_DIR="$OUT/base_hf" SAVE_DIR="$OUT/base_mcore" "then" \
        tune_llama2_7b_lora_ptd DRY_RUN=1
}

tune() {
    bash "$RECIPES"/tune_llama2_7b_lora_ptd.sh --loss-curve "$OUT/loss_tune.png" | progress
}

fresh_directory
export STAGES=$OUT/stages.tsv TOKENIZER_PATH=$OUT/tokenizer_and_config LOG_DIR=$OUT/logs WORKERS=1
export MASTER_PORT=${MASTER_PORT:-6000}
SHUFFLE=${SHUFFLE_ANSWERS:+--shuffle-answers}
STARTED=$(date +%s.%N)

stage "install" ensure_environment
stage "prepare data" "$PYTHON" examples/quickstart/prepare.py "$OUT" \
    --hidden-size "${HIDDEN_SIZE:-256}" --num-layers "${NUM_LAYERS:-6}" ${SHUFFLE:+"$SHUFFLE"}
stage "pre-train" pretrain
settings_of_tuning
stage "export, convert for TP=2, plan" convert
stage "tune with LoRA on two processes" tune
set +e
stage "merge, export, answer, judge" "$PYTHON" examples/quickstart/report.py "$OUT"
STATUS=$?
set -e

printf '\n%10s  stage\n' seconds
awk -F'\t' '{ printf "%10.1f  %s\n", $1, substr($2, 1, 2) == "= " ? substr($2, 3) : "  of which " $2 }' "$STAGES"
printf '%10s  everything\n\n' "$(seconds_since "$STARTED")"
cat <<TEXT
$OUT/
  data/            corpus, instructions, held-out rows, and their token files
  pretrained/      training checkpoint           loss_pretrain.png
  base_hf/         Hugging Face export of it     base_mcore/   the same for TP=2
  adapters/        LoRA adapters                 loss_tune.png
  tuned_hf/        merged model, ready for transformers
  logs/            output of every recipe
Your own data: python posttrain_gpt.py --stage sft --load $OUT/base_hf --data-path my.json --lora-r 16 --save out
TEXT
exit "$STATUS"
