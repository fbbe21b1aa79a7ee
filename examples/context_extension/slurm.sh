#!/usr/bin/env bash
#SBATCH --job-name=context-extension
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# sbatch --nodes 4 examples/context_extension/slurm.sh examples/context_extension/dense_8b.sh [Megatron's flags]
# The job saves and ends before its time is over, goes back into the queue, and goes on from its checkpoint.
set -euo pipefail

die() {
    echo "slurm.sh: error: $1" >&2
    exit 2
}

model=${1:-}
[[ -f $model ]] || die "the first argument is '$model'; allowed: the script of a model, e.g. dense_8b.sh"
shift
name=$(basename "$model" .sh)
export OUT=${OUT:-out/$name} TRAIN_ITERS=${TRAIN_ITERS:-1000} EXIT_MINUTES=${EXIT_MINUTES:-1380}
export GPUS_PER_NODE=${GPUS_PER_NODE:-8}
[[ -z ${SLURM_NNODES:-} ]] || export NNODES=$SLURM_NNODES

if [[ ${DRY_RUN:-0} == 1 ]]; then
    echo "srun --kill-on-bad-exit=1 bash $model $*"
    MASTER_ADDR=${MASTER_ADDR:-localhost} exec bash "$model" "$@"
fi
[[ -n ${SLURM_JOB_ID:-} ]] || die "SLURM_JOB_ID is not set; allowed: sbatch --nodes N slurm.sh $model, or DRY_RUN=1"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
srun --kill-on-bad-exit=1 bash "$model" "$@" # a run that fails ends the job here and is not repeated

# Megatron ends with 0 when its minutes are over, too.
tracker=$OUT/checkpoints/latest_checkpointed_iteration.txt
[[ -f $tracker ]] || die "no checkpoint in $OUT/checkpoints after the run"
if (($(< "$tracker") < TRAIN_ITERS)); then
    echo "slurm.sh: iteration $(< "$tracker") of $TRAIN_ITERS; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
