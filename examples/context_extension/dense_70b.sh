#!/usr/bin/env bash
# A dense model of 70B parameters (Llama 3's shape), 8k -> 128k tokens: 32 nodes of 8 GPUs with 80 GB.
set -euo pipefail
source "$(dirname "$0")/common.sh"

NAME=dense_70b NODES=32 VOCABULARY=128256
MODEL=(
    --num-layers 80
    --hidden-size 8192
    --ffn-hidden-size 28672
    --num-attention-heads 64
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
LAYOUT=( # 16k tokens of a sequence on a rank, 2k of them between the layers; tensor parallelism stays in a node
    --tensor-model-parallel-size 8
    --sequence-parallel
    --pipeline-model-parallel-size 4
    --context-parallel-size 8
)
TRAINING=(
    --global-batch-size "${GLOBAL_BATCH_SIZE:-32}"
    --lr "${LR:-1e-5}"
    --min-lr 1e-6
    --lr-decay-style cosine
    --lr-warmup-fraction 0.02
    --weight-decay 0.1
    --adam-beta2 0.95
    --clip-grad 1.0
)
extend "$@"
