# Sourced by the launch scripts in pretrain/ and context_extension/: checks the variables, puts Megatron's flags
# together, starts torchrun. A script calls, in this order: shape, defaults, on_gpus, on_cpu, start "$@".
# The variables are described in README.md. Every mistake ends in one line and exit code 2.

die() {
    echo "${0##*/}: error: $1" >&2
    exit 2
}

source "${BASH_SOURCE[0]%/*}/models.sh" # shape

require() { # NAME WHAT: the variable is set
    [[ -n ${!1:-} ]] || die "$1 is not set; requires $2"
}

switch() { # NAME: the variable is on, "1", or off
    [[ ${!1:-0} == [01] ]] || die "$1 is '${!1}'; allowed: 1 or 0"
    [[ ${!1:-0} == 1 ]]
}

defaults() { # NAME=VALUE ...: variables that are not set; where VALUE is a number, others have to be numbers too
    local pair name value
    for pair in "$@"; do
        name=${pair%%=*} value=${pair#*=}
        [[ -n ${!name:-} ]] || printf -v "$name" %s "$value"
        [[ ! $value =~ ^[0-9]+$ ]] || whole "$name" 1
    done
}

whole() { # NAME LEAST [MOST]: the variable, where it is set, is a whole number
    local text="a whole number, $2 ${3:+to }${3:-or more}"
    [[ -n ${!1:-} ]] || return 0
    [[ ${!1} =~ ^(0|[1-9][0-9]{0,14})$ ]] && ((${!1} >= $2 && ${!1} <= ${3:-${!1}})) ||
        die "$1 is '${!1}'; allowed: $text"
}

number() { # NAME CONDITION WHAT: the variable, where it is set, is a number x with CONDITION, in awk
    [[ -n ${!1:-} ]] || return 0
    [[ ${!1} =~ ^[0-9]*\.?[0-9]+([eE][-+]?[0-9]{1,2})?$ ]] && awk -v x="${!1}" "BEGIN { exit !($2) }" ||
        die "$1 is '${!1}'; allowed: $3"
}

tools() { # NAME ...: the commands are there
    local tool
    for tool in "$@"; do
        command -v "$tool" > /dev/null || die "$tool is not on PATH, and this script needs it"
    done
}

tools awk

on_gpus() { # NAME=VALUE ...: defaults of a run on GPUs
    switch CPU || defaults "$@"
}

on_cpu() { # NAME=VALUE ...: the layout of CPU=1 on its two processes; what is meant for a cluster does not count
    switch CPU || return 0
    NNODES=1 GPUS_PER_NODE=2 TP=1 PP=1 CP=1 EP=1 ETP=1
    local pair
    for pair in "$@"; do printf -v "${pair%%=*}" %s "${pair#*=}"; done
}

if switch CPU; then # before the defaults of a script
    defaults SEQ_LENGTH=128 TRAIN_ITERS=4 MICRO_BATCH_SIZE=1 GLOBAL_BATCH_SIZE=4
    EVAL_ITERS=${EVAL_ITERS:-1}
fi

flag_value() { # FLAG WORD ...: the value of the last FLAG among the words, or nothing
    local flag=$1 word found='' previous=''
    for word in "${@:2}"; do
        [[ $previous != "$flag" ]] || found=$word
        [[ $word != "$flag="* ]] || found=${word#*=}
        previous=$word
    done
    echo "$found"
}

run() { # COMMAND ...: print it (DRY_RUN=1) or run it
    if switch DRY_RUN; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

CONTINUED=()
continue_checkpoint() { # sets CONTINUED: begin with the weights of CHECKPOINT; call it before defaults
    if [[ -z ${CHECKPOINT:-} ]]; then
        switch MOCK || die "CHECKPOINT is not set; requires a folder made by --save, or MOCK=1 for random weights and data"
        return
    fi
    [[ -f $CHECKPOINT/latest_checkpointed_iteration.txt ]] ||
        die "CHECKPOINT is '$CHECKPOINT', which is not a folder made by --save"
    CONTINUED=(--pretrained-checkpoint "$CHECKPOINT")
    [[ ${POSITION:-fope} == fope ]] || return 0
    case ${START:-immediate} in
        immediate | function-preserving | clip-only) ;;
        *) die "START is '$START'; allowed: immediate, function-preserving or clip-only" ;;
    esac
    whole ANNEAL_ITERS 1
    # Each is without effect on the other kind of checkpoint, and when the job resumes from its own.
    CONTINUED+=(--fope-start-from-rope "${START:-immediate}" --fope-grow)
    [[ -z ${ANNEAL_ITERS:-} ]] || CONTINUED+=(--fope-anneal-iters "$ANNEAL_ITERS")
    [[ -z ${ROTARY_BASE:-} ]] || CONTINUED+=(--fope-change-rotary-base)
}

_position() { # sets POSITION_FLAGS
    defaults POSITION=fope
    POSITION_FLAGS=(--position-embedding-type "$POSITION" --rotary-base "$ROTARY_BASE")
    case $POSITION in
        rope) ;;
        fope)
            number GAIN 'x > 0' 'a number, more than 0'
            POSITION_FLAGS+=(--fope-train-length "$SEQ_LENGTH")
            [[ -z ${GAIN:-} ]] || POSITION_FLAGS+=(--fope-gain "$GAIN")
            ;;
        *) die "POSITION is '$POSITION'; allowed: rope or fope" ;;
    esac
}

_divides() { # LEFT RIGHT WHAT: LEFT divides RIGHT
    (($2 % $1 == 0)) || die "$3"
}

_layout() { # sets LAYOUT
    defaults NNODES=1 GPUS_PER_NODE=8 TP=1 PP=1 CP=1 EP=1 ETP=1
    local ranks=$((NNODES * GPUS_PER_NODE)) model=$((TP * PP * CP)) experts layers groups name
    local given="NNODES x GPUS_PER_NODE is $NNODES x $GPUS_PER_NODE = $ranks GPUs"
    experts=$(flag_value --num-experts "${MODEL[@]}") layers=$(flag_value --num-layers "${MODEL[@]}")
    groups=$(flag_value --num-query-groups "${MODEL[@]}")
    [[ -n $groups ]] || groups=$(flag_value --num-attention-heads "${MODEL[@]}")
    for name in TP PP CP EP ETP; do
        ((${!name} <= ranks)) || die "$name is ${!name}, but $given"
    done
    _divides $model $ranks "TP x PP x CP is $TP x $PP x $CP = $model, but $given; allowed: a divisor of $ranks"
    _divides "$PP" "$layers" "PP is $PP; allowed: divisors of the model's $layers layers"
    ((TP <= groups ? groups % TP == 0 : TP % groups == 0)) ||
        die "TP is $TP; allowed: divisors or multiples of the model's $groups key and value heads"
    ((CP == 1 || SEQ_LENGTH % (2 * CP) == 0)) ||
        die "SEQ_LENGTH is $SEQ_LENGTH; allowed: multiples of $((2 * CP)) with CP=$CP"
    if [[ -n $experts ]]; then
        _divides "$EP" "$experts" "EP is $EP; allowed: divisors of the model's $experts experts"
        _divides $((EP * ETP * PP)) $ranks "EP x ETP x PP is $EP x $ETP x $PP = $((EP * ETP * PP)), but $given; allowed: a divisor of $ranks"
    elif ((EP * ETP > 1)); then
        die "EP is $EP and ETP is $ETP, but the model has no experts; allowed: 1"
    fi
    local replicas=$((ranks / model))
    _divides $((MICRO_BATCH_SIZE * replicas)) "$GLOBAL_BATCH_SIZE" \
        "GLOBAL_BATCH_SIZE is $GLOBAL_BATCH_SIZE; allowed: multiples of MICRO_BATCH_SIZE x $replicas data-parallel replicas = $((MICRO_BATCH_SIZE * replicas))"

    LAYOUT=(
        --tensor-model-parallel-size "$TP"
        --pipeline-model-parallel-size "$PP"
        --context-parallel-size "$CP"
        --use-distributed-optimizer
    )
    ((TP == 1)) || LAYOUT+=(--sequence-parallel)
    [[ -z $experts ]] || LAYOUT+=(--expert-model-parallel-size "$EP" --expert-tensor-parallel-size "$ETP")
    switch CPU || LAYOUT+=(--overlap-grad-reduce --overlap-param-gather)
}

_files_of() { # NAME WORD ...: the data sets among the words, with or without weights, are there
    local name=$1 word
    for word in "${@:2}"; do
        [[ $word =~ ^[0-9.]+$ || $word == *://* ]] && continue
        if switch PACKED; then
            [[ -f $word ]] || die "$name: $word does not exist"
        else
            [[ -f $word.bin && -f $word.idx ]] || die "$name: $word.bin or $word.idx does not exist"
        fi
    done
}

_tokenizer() { # sets TOKENIZER_FLAGS
    require TOKENIZER "a folder of a Hugging Face tokenizer, its name on the hub, or bytes (see prepare-data)"
    # A name on the hub is at most two words; it cannot be checked before the run.
    [[ -e $TOKENIZER || $TOKENIZER =~ ^[[:alnum:]_-][[:alnum:]._-]*(/[[:alnum:]._-]+)?$ ]] ||
        die "TOKENIZER: $TOKENIZER does not exist, and is no name on the Hugging Face hub either"
    if [[ $TOKENIZER == bytes ]]; then
        TOKENIZER_FLAGS=(--tokenizer-type NullTokenizer --vocab-size 257)
    elif switch PACKED; then
        TOKENIZER_FLAGS=(--tokenizer-type SFTTokenizer --tokenizer-model "$TOKENIZER")
        TOKENIZER_FLAGS+=(--sft-tokenizer-prompt-format "${PROMPT_FORMAT:-default}")
    else
        TOKENIZER_FLAGS=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER")
    fi
}

_data() { # sets DATA
    if switch MOCK; then
        DATA=(--mock-data --tokenizer-type NullTokenizer --vocab-size "$VOCABULARY")
        return
    fi
    require DATA_PATH "what Megatron's --data-path takes: prefixes of .bin/.idx, or with weights"
    _tokenizer
    [[ ${SPLIT:-1} =~ ^[0-9.]+(,[0-9.]+){0,2}$ ]] ||
        die "SPLIT is '$SPLIT'; allowed: up to three numbers, for example 99,1,0"
    local words
    read -ra words <<< "$DATA_PATH"
    _files_of DATA_PATH "${words[@]}"
    DATA=(--data-path "${words[@]}" "${TOKENIZER_FLAGS[@]}" --split "${SPLIT:-99,1,0}")
    # Documents that do not see each other; ranks then count different numbers of tokens.
    ! switch PACKED || DATA+=(--sft --calculate-per-token-loss)
}

_launcher() { # sets LAUNCHER
    # With more than one connection, kernels and communication may start in another order than Megatron needs.
    LAUNCHER=(env "CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}")
    LAUNCHER+=(torchrun --nproc-per-node "$GPUS_PER_NODE" --nnodes "$NNODES")
    whole NODE_RANK 0 $((NNODES - 1))
    whole SLURM_NODEID 0 $((NNODES - 1))
    whole MASTER_PORT 1 65535
    whole CUDA_DEVICE_MAX_CONNECTIONS 1
    [[ ${SCRIPT:-pretrain} == pretrain || -f $SCRIPT ]] ||
        die "SCRIPT is '$SCRIPT'; allowed: pretrain, or a file"
    if ((NNODES > 1)); then
        require MASTER_ADDR "the name of the first node (slurm.sh sets it)"
        LAUNCHER+=(--node-rank "${NODE_RANK:-${SLURM_NODEID:-0}}")
        LAUNCHER+=(--master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
    else
        LAUNCHER+=(--standalone)
    fi
    LAUNCHER+=(-m megatron_fope)
    ! switch CPU || LAUNCHER+=(--cpu)
    LAUNCHER+=("${SCRIPT:-pretrain}")
}

_gpus_of_this_machine() {
    local here
    if switch CPU || ! command -v nvidia-smi > /dev/null; then return; fi
    here=$(nvidia-smi --list-gpus | grep -c '^GPU') || true
    ((GPUS_PER_NODE <= here)) || die "GPUS_PER_NODE is $GPUS_PER_NODE, but this machine has $here GPUs"
}

_children() { # PID: its child processes
    local stat words
    for stat in /proc/[0-9]*/stat; do
        words=$(cat "$stat" 2> /dev/null) || continue # it has ended
        read -ra words <<< "${words##*) }"            # behind the name: state, parent
        [[ ${words[1]} != "$1" ]] || basename "${stat%/stat}"
    done
}

_until_told() { # COMMAND ...: a TERM to this script makes Megatron save and end
    # torchrun, told itself, would kill its ranks after half a minute, in the middle of a large checkpoint.
    "$@" &
    local agent=$! told=1 code=0
    # shellcheck disable=SC2046 # each is a word
    trap 'told=1; kill -TERM $(_children "$agent") 2> /dev/null || true' TERM
    while ((told)); do # a signal ends wait, too
        told=0
        wait "$agent" && code=0 || code=$?
    done
    exit "$code"
}

start() { # FLAG ...: check everything, then print the command (DRY_RUN=1) or run it
    local folder flag
    for flag in --train-samples --yaml-cfg; do
        [[ " $* " != *" $flag"[\ =]* ]] || die "$flag is given; use --train-iters and the other flags"
    done
    whole EVAL_ITERS 0
    local minutes
    minutes=$(flag_value --exit-duration-in-mins "$@")
    [[ -z $minutes ]] || EXIT_MINUTES=$minutes
    whole EXIT_MINUTES 1
    number LR 'x > 0' 'a number, more than 0'
    number WARMUP_FRACTION 'x >= 0 && x < 1' 'a number, 0 to less than 1'
    folder=$(cd "$(dirname "$0")" && pwd)
    defaults MICRO_BATCH_SIZE=1 SAVE_INTERVAL=500 WARMUP_FRACTION=0.01
    _position
    defaults OUT="out/${folder##*/}/$(basename "$0" .sh)-$POSITION"
    _layout
    _data
    _launcher
    local training=(
        --seq-length "$SEQ_LENGTH"
        --max-position-embeddings "$SEQ_LENGTH"
        # A mask would take length x length bytes a sequence.
        --no-create-attention-mask-in-dataloader
        --micro-batch-size "$MICRO_BATCH_SIZE"
        --global-batch-size "$GLOBAL_BATCH_SIZE"
        --train-iters "$TRAIN_ITERS"
        --lr "$LR"
        --min-lr "$(awk -v lr="$LR" 'BEGIN { print lr / 10 }')"
        --lr-decay-style cosine
        --lr-warmup-fraction "$WARMUP_FRACTION"
        --weight-decay 0.1
        --adam-beta1 0.9
        --adam-beta2 0.95
        --clip-grad 1.0
    )
    local files=(
        --load "$OUT/checkpoints"
        --save "$OUT/checkpoints"
        --save-interval "$SAVE_INTERVAL"
        --tensorboard-dir "$OUT/tensorboard"
        --log-interval 1
        --log-throughput
        --eval-interval 1000
        --eval-iters "${EVAL_ITERS:-10}"
    )
    [[ -z ${EXIT_MINUTES:-} ]] || files+=(--exit-duration-in-mins "$EXIT_MINUTES")
    ! switch SAVE_ON_TERM || files+=(--exit-signal-handler)
    local command=(
        "${LAUNCHER[@]}" "${MODEL[@]}" "${LAYOUT[@]}" "${POSITION_FLAGS[@]}" "${CONTINUED[@]}" "${training[@]}"
        "${DATA[@]}" "${files[@]}" "$@"
    )
    if switch DRY_RUN; then
        run "${command[@]}"
        return
    fi
    _gpus_of_this_machine
    tools torchrun
    ! switch SAVE_ON_TERM || [[ -r /proc/self/stat ]] ||
        die "SAVE_ON_TERM is 1, but there is no /proc to find the ranks in"
    mkdir -p "$OUT" || die "OUT is '$OUT'; use a folder that can be written"
    if switch SAVE_ON_TERM; then
        _until_told "${command[@]}"
    else
        exec "${command[@]}"
    fi
}
