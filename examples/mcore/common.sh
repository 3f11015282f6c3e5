# shellcheck shell=bash
# What every recipe shares: python, launcher, log, dry run. Sourced by the recipes, not run.
#
# A recipe names only what differs from the library's defaults. These variables of the environment change it:
#   DATA_PATH CKPT_LOAD_DIR CKPT_SAVE_DIR CHECKPOINT CHECKPOINT_LORA   paths; each recipe's defaults stand in it
#   TOKENIZER_PATH or TOKENIZER_MODEL   directory, tokenizer.json or tokenizer.model; the first wins
#   TP PP                               tensor and pipeline parallel sizes
#   NPROC_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT            as torchrun has them
#   MIN_NNODES                          fewer hosts that a run may go on with when some are gone (default: NNODES)
#   MAX_RESTARTS SHUTDOWN_TIMEOUT       how often a failed run is started again (3); seconds to save in when told to stop
#   SEQ_LENGTH MBS GBS TRAIN_ITERS LR   sizes of a training run
#   DTYPE_FLAG                          --bf16 (default), --fp16, or empty for fp32
#   PYTHON                              interpreter (default: python)
#   LOG_DIR                             where <recipe>.log goes (default: logs)
#   DRY_RUN=1                           print what would be done, in one process and on any machine
#   HF_CONFIG                           config.json that a dry run plans by where the model is not there (Llama-2-7b's)
# Arguments of a recipe are flags of its program, and win over the recipe's own:
#   bash tune_llama2_7b_full_ptd.sh --log-throughput --prompt-type chatml --no-sequence-parallel
# Paths are relative to the repository's root, wherever a recipe is called from.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON=${PYTHON:-$(command -v python || command -v python3)}
LOG_DIR=${LOG_DIR:-logs}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}
MIN_NNODES=${MIN_NNODES:-$NNODES}
SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-600}
DTYPE_FLAG=${DTYPE_FLAG---bf16}
HF_CONFIG=${HF_CONFIG:-configs/llama2/config.json}
# shellcheck disable=SC2034  # the recipes use it
TOKENIZER=${TOKENIZER_PATH:-${TOKENIZER_MODEL:-./model_from_hf/llama-2-7b-hf/}}

# Megatron's overlap of tensor-parallel communication relies on one hardware queue per CUDA device.
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTHONUNBUFFERED=1
# megatron-core calls collectives by names that torch 2.13 renames.
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning:torch.distributed.c10d_logger}

# What the recipe was called with; it stands at the end of what the recipe runs.
GIVEN=("$@")

# settle WORD...: set WORDS to these, without those flags of the recipe, and their values, that were given to it as well.
settle() {
    local own=$(($# - ${#GIVEN[@]})) word flag names=" " dropping=0
    for word in ${GIVEN[@]+"${GIVEN[@]}"}; do
        flag=${word%%=*}
        if [[ $word == --* ]]; then names+="${flag/#--no-/--} "; fi
    done
    WORDS=()
    for word in "${@:1:own}"; do
        if [[ $word == --* ]]; then
            flag=${word%%=*}
            dropping=0
            if [[ $names == *" ${flag/#--no-/--} "* ]]; then dropping=1; fi
        fi
        if ((dropping == 0)); then WORDS+=("$word"); fi
    done
    WORDS+=(${GIVEN[@]+"${GIVEN[@]}"})
    GIVEN=()
}

# run_one PROGRAM FLAG...: one process; its output also goes to LOG_DIR/<recipe>.log.
run_one() {
    local dry_run=
    if [[ ${DRY_RUN:-0} == 1 ]]; then dry_run=--dry-run; fi
    settle "$@"
    mkdir -p "$LOG_DIR"
    "$PYTHON" "${WORDS[@]}" ${dry_run:+"$dry_run"} 2>&1 | tee "$LOG_DIR/$(basename "$0" .sh).log"
}

# describe WORD...: set SHAPE to the flag that describes the model of these where it is not there to describe itself.
describe() {
    local before='' word
    SHAPE=()
    for word in "$@"; do
        if [[ $before == --load && ! -e $word && " $* " != *" --hf-config"* ]]; then SHAPE=(--hf-config "$HF_CONFIG"); fi
        before=$word
    done
}

# run_ranks PROGRAM FLAG...: NPROC_PER_NODE processes on each of NNODES hosts.
run_ranks() {
    local world_size=$((NPROC_PER_NODE * NNODES))
    settle "$@"
    set -- "${WORDS[@]}"
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        describe "$@"
        WORLD_SIZE=$world_size run_one "$@" ${SHAPE[@]+"${SHAPE[@]}"}
    elif ((world_size == 1)); then
        run_one "$@"
    else
        # The doors share the cores among the processes themselves; without a value torchrun warns.
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
        # With c10d the store lives in the launcher of the first host, and so outlives ranks that fail.
        # docs/recovery.md says what these options are for.
        run_one -m torch.distributed.run --nproc_per_node "$NPROC_PER_NODE" --nnodes "$MIN_NNODES:$NNODES" \
            --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv_id "$MASTER_ADDR:$MASTER_PORT" \
            --rdzv_conf "is_host=$((NODE_RANK == 0))" --max_restarts "${MAX_RESTARTS:-3}" \
            --shutdown_timeout "$SHUTDOWN_TIMEOUT" --signals_to_handle SIGTERM,SIGINT,SIGUSR1 "$@"
    fi
}
