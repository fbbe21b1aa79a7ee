#!/usr/bin/env bash
#SBATCH --job-name=megatron-fope
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# sbatch --nodes 4 examples/slurm.sh examples/pretrain/dense_8b.sh [Megatron's flags]
# Any script that trains, on the nodes of a job. SLURM sends TERM to every node 15 minutes before the time is over;
# Megatron saves and ends, the job goes back into the queue, and goes on from its checkpoint.
set -euo pipefail

die() {
    echo "slurm.sh: error: $1" >&2
    exit 2
}

last() { # FLAG: what the command has behind its last FLAG
    local i
    for ((i = ${#words[@]} - 2; i > 0; i--)); do
        [[ ${words[i]} != "$1" ]] || break
    done
    echo "${words[i + 1]}"
}

script=${1:-}
[[ -f $script ]] || die "the first argument is '$script'; allowed: a launch script, e.g. pretrain/dense_8b.sh"
shift
export SAVE_ON_TERM=1 GPUS_PER_NODE=${GPUS_PER_NODE:-8}
[[ -z ${SLURM_NNODES:-} ]] || export NNODES=$SLURM_NNODES
if [[ -n ${SLURM_JOB_END_TIME:-} && -z ${EXIT_MINUTES:-} ]]; then # should the signal not arrive
    export EXIT_MINUTES=$(((SLURM_JOB_END_TIME - $(date +%s)) / 60 - 10))
fi

if [[ ${DRY_RUN:-0} == 1 ]]; then
    command=$(MASTER_ADDR=${MASTER_ADDR:-localhost} bash "$script" "$@")
    printf 'srun --kill-on-bad-exit=1 bash %s\n%s\n' "$script $*" "$command"
    exit
fi
[[ -n ${SLURM_JOB_ID:-} ]] || die "SLURM_JOB_ID is not set; allowed: sbatch --nodes N slurm.sh $script, or DRY_RUN=1"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
command=$(DRY_RUN=1 bash "$script" "$@") # what is wrong is told here, once, and not by every node
eval "words=($command)"
srun --kill-on-bad-exit=1 bash "$script" "$@" # a run that fails ends the job here and is not repeated

# Megatron also ends with 0 when it was told to, or its minutes are over.
tracker=$(last --save)/latest_checkpointed_iteration.txt
iterations=$(last --train-iters)
[[ -f $tracker ]] || die "there is no $tracker after the run"
if (($(< "$tracker") < iterations)); then
    echo "slurm.sh: iteration $(< "$tracker") of $iterations; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
