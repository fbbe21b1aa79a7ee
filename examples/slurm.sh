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

last() { # FLAG: the value of the last FLAG of the command, or nothing
    local i
    for ((i = ${#words[@]} - 1; i > 0; i--)); do
        case ${words[i]} in
            "$1="*) echo "${words[i]#*=}" && return ;;
            "$1") echo "${words[i + 1]:-}" && return ;;
        esac
    done
}

saved() { # the iteration of the latest checkpoint, or nothing
    [[ ! -f $tracker ]] || tr -d '[:space:]' < "$tracker"
}

script=${1:-}
[[ -f $script ]] || die "the first argument is '$script'; use a launch script, e.g. pretrain/dense_8b.sh"
shift
[[ ${DRY_RUN:-0} == [01] ]] || die "DRY_RUN is '$DRY_RUN'; allowed: 1 or 0"
export SAVE_ON_TERM=1 GPUS_PER_NODE=${GPUS_PER_NODE:-8}
[[ -z ${SLURM_NNODES:-} ]] || export NNODES=$SLURM_NNODES
if [[ -n ${SLURM_JOB_END_TIME:-} && -z ${EXIT_MINUTES:-} ]]; then # should the signal not arrive
    [[ $SLURM_JOB_END_TIME =~ ^[1-9][0-9]{0,17}$ ]] ||
        die "SLURM_JOB_END_TIME is '$SLURM_JOB_END_TIME'; allowed: seconds since 1970, as SLURM sets it"
    left=$(((SLURM_JOB_END_TIME - $(date +%s)) / 60))
    ((left > 10)) || die "the job ends in $left minutes; requires more than the 10 that are kept for saving"
    export EXIT_MINUTES=$((left - 10))
fi

if [[ ${DRY_RUN:-0} == 1 ]]; then
    command=$(MASTER_ADDR=${MASTER_ADDR:-localhost} bash "$script" "$@")
    printf 'srun --kill-on-bad-exit=1 bash %s\n%s\n' "$script $*" "$command"
    exit
fi
[[ -n ${SLURM_JOB_ID:-} ]] || die "SLURM_JOB_ID is not set; use sbatch --nodes N slurm.sh $script, or DRY_RUN=1"
for tool in srun scontrol; do
    command -v "$tool" > /dev/null || die "$tool is not on PATH, and this script needs it"
done
[[ -n ${SLURM_JOB_NODELIST:-} ]] || die "SLURM_JOB_NODELIST is not set; SLURM sets it in a job"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || die "scontrol cannot list the nodes of this job"
MASTER_ADDR=${hosts%%$'\n'*}
export MASTER_ADDR
command=$(DRY_RUN=1 bash "$script" "$@") # what is wrong is told here, once, and not by every node
eval "words=($command)"
iterations=$(last --train-iters) tracker=$(last --save)/latest_checkpointed_iteration.txt
[[ $iterations =~ ^[0-9]{1,15}$ ]] || die "--train-iters is '$iterations'; allowed: a whole number, 1 or more"
before=$(saved)
[[ $before =~ ^[0-9]+$ ]] || before=0 # none yet, or a converted model, which counts from 0
srun --kill-on-bad-exit=1 bash "$script" "$@" # a run that fails ends the job here and is not repeated

# Megatron also ends with 0 when it was told to, or its minutes are over.
now=$(saved)
[[ $now =~ ^[0-9]+$ ]] || die "there is no iteration in $tracker after the run"
((10#$now < 10#$iterations)) || exit 0
((10#$now > 10#$before)) ||
    die "the run ended where it began, at iteration $now of $iterations; not back into the queue"
echo "slurm.sh: iteration $now of $iterations; back into the queue"
scontrol requeue "$SLURM_JOB_ID"
