#!/usr/bin/env bash
# A dense model of 8B parameters (Llama 3's shape), 8k -> 128k tokens: 4 nodes of 8 GPUs with 80 GB.
set -euo pipefail
source "$(dirname "$0")/common.sh"

NAME=dense_8b NODES=4 VOCABULARY=128256
MODEL=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
    --bf16
)
LAYOUT=( # 16k tokens of a sequence on a rank, 4k of them between the layers
    --tensor-model-parallel-size 4
    --sequence-parallel
    --context-parallel-size 8
)
TRAINING=(
    --global-batch-size "${GLOBAL_BATCH_SIZE:-32}"
    --lr "${LR:-2e-5}"
    --min-lr 2e-6
    --lr-decay-style cosine
    --lr-warmup-fraction 0.02
    --weight-decay 0.1
    --adam-beta2 0.95
    --clip-grad 1.0
)
extend "$@"
