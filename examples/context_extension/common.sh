# Sourced by the scripts of the models: checks the variables, puts the flags together, starts torchrun.
# Sets nothing by itself. A model's script sets NAME, NODES, MODEL, LAYOUT and TRAINING and calls: extend "$@"
# The variables are described in README.md.

die() {
    echo "${0##*/}: error: $1" >&2
    exit 2
}

require() { # NAME WHAT: stop in one line when the variable is empty
    [[ -n ${!1:-} ]] || die "$1 is not set; allowed: $2"
}

extend() {
    local length=${SEQ_LENGTH:-131072} iterations=${TRAIN_ITERS:-1000} base=${ROTARY_BASE:-500000}
    local out=${OUT:-out/$NAME} nodes=${NNODES:-$NODES} gpus=${GPUS_PER_NODE:-8}
    local cpu=() data=() start=() launch=()

    # A mask would take length x length bytes a sequence; recomputation keeps one layer's activations at a time.
    local long=(
        --seq-length "$length"
        --max-position-embeddings "$length"
        --no-create-attention-mask-in-dataloader
        --recompute-granularity full
        --recompute-method uniform
        --recompute-num-layers 1
        --micro-batch-size 1
    )
    local fope=(
        --position-embedding-type fope
        --fope-train-length "$length"
        --rotary-base "$base"
    )

    if [[ -n ${CHECKPOINT:-} ]]; then
        # Each is without effect on the other kind of checkpoint, and when the job resumes from its own.
        start=(--pretrained-checkpoint "$CHECKPOINT" --fope-start-from-rope "${START:-immediate}" --fope-grow)
        [[ -z ${ANNEAL_ITERS:-} ]] || start+=(--fope-anneal-iters "$ANNEAL_ITERS")
        [[ -z ${ROTARY_BASE:-} ]] || start+=(--fope-change-rotary-base)
    elif [[ ${MOCK:-0} != 1 ]]; then
        die "CHECKPOINT is not set; allowed: a folder made by --save, or MOCK=1 for random weights and data"
    fi

    if [[ ${MOCK:-0} == 1 ]]; then
        data=(--mock-data --tokenizer-type NullTokenizer --vocab-size "$VOCABULARY")
    else
        require DATA_PATH "what Megatron's --data-path takes: prefixes of .bin/.idx, or with weights"
        require TOKENIZER "a Hugging Face tokenizer, folder or name"
        read -ra data <<< "$DATA_PATH"
        data=(--data-path "${data[@]}" --tokenizer-model "$TOKENIZER")
        if [[ ${PACKED:-0} == 1 ]]; then
            # Documents that do not see each other; ranks then count different numbers of tokens.
            data+=(--sft --tokenizer-type SFTTokenizer --sft-tokenizer-prompt-format "${PROMPT_FORMAT:-default}")
            data+=(--calculate-per-token-loss)
        else
            data+=(--tokenizer-type HuggingFaceTokenizer)
        fi
        data+=(--split "${SPLIT:-99,1,0}")
    fi

    local run=(
        --train-iters "$iterations"
        --load "$out/checkpoints"
        --save "$out/checkpoints"
        --save-interval "${SAVE_INTERVAL:-100}"
        --tensorboard-dir "$out/tensorboard"
        --log-interval 1
        --log-throughput
        --eval-iters 0
    )
    [[ -z ${EXIT_MINUTES:-} ]] || run+=(--exit-duration-in-mins "$EXIT_MINUTES")

    if [[ ${CPU:-0} == 1 ]]; then # the same script with a model of a few channels, on two processes
        nodes=1 gpus=2 cpu=(--cpu)
        LAYOUT=(--context-parallel-size 2)
        MODEL+=(
            --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --num-query-groups 2
            --kv-channels 16
        )
        TRAINING+=(--global-batch-size 2)
        [[ ${MOCK:-0} != 1 ]] || data=(--mock-data --tokenizer-type NullTokenizer --vocab-size 127)
    else
        LAYOUT+=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
    fi

    launch=(torchrun --nproc-per-node "$gpus" --nnodes "$nodes")
    if ((nodes > 1)); then
        require MASTER_ADDR "the name of the first node (slurm.sh sets it)"
        launch+=(--node-rank "${NODE_RANK:-${SLURM_NODEID:-0}}")
        launch+=(--master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
    fi
    local command=(
        "${launch[@]}" -m megatron_fope "${cpu[@]}" "${SCRIPT:-pretrain}"
        "${MODEL[@]}" "${LAYOUT[@]}" "${long[@]}" "${fope[@]}" "${start[@]}"
        "${TRAINING[@]}" "${data[@]}" "${run[@]}" "$@"
    )
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "${command[@]}"
        echo
    else
        mkdir -p "$out"
        exec "${command[@]}"
    fi
}
