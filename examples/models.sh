# Sourced by common.sh: the shapes of the models, each in one place.

shape() { # NAME: sets MODEL and VOCABULARY
    local experts=(
        --num-experts 8
        --moe-router-topk 2
        --moe-router-load-balancing-type aux_loss
        --moe-aux-loss-coeff 0.01
        --moe-token-dispatcher-type alltoall
    )
    #                              layers  hidden    ffn  heads  groups
    case $1 in
        olmo_60m) _decoder              8     512   2048      8       8 --norm-epsilon 1e-6 ;;
        olmo_180m) _decoder             8    1024   4096      8       8 --norm-epsilon 1e-6 ;;
        olmo_1.2b) _decoder            16    2048   8192     16      16 --norm-epsilon 1e-6 ;;
        llama_8b) _decoder             32    4096  14336     32       8 ;;
        llama_70b) _decoder            80    8192  28672     64       8 ;;
        mixtral_8x7b) _decoder         32    4096  14336     32       8 "${experts[@]}" ;;
        *) die "no model '$1'; use one of models.sh" ;;
    esac
    case $1 in
        olmo_*) VOCABULARY=50280 ;;
        llama_*) VOCABULARY=128256 ;;
        mixtral_*) VOCABULARY=32000 ;;
    esac
    ! switch CPU || VOCABULARY=255
}

_decoder() { # LAYERS HIDDEN FFN HEADS GROUPS FLAG ...: sets MODEL; with CPU=1 a model of 64 channels
    local layers=$1 hidden=$2 ffn=$3 heads=$4 groups=$5
    if switch CPU; then
        ((groups = groups < heads ? 2 : 4))
        layers=2 hidden=64 ffn=128 heads=4
    fi
    MODEL=(
        --num-layers "$layers"
        --hidden-size "$hidden"
        --ffn-hidden-size "$ffn"
        --num-attention-heads "$heads"
        --kv-channels $((hidden / heads))
        --normalization RMSNorm
        --swiglu
        --disable-bias-linear
        --untie-embeddings-and-output-weights
        --attention-dropout 0
        --hidden-dropout 0
        --bf16
    )
    ((groups == heads)) || MODEL+=(--group-query-attention --num-query-groups "$groups")
    MODEL+=("${@:6}")
}
