#!/usr/bin/env bash
# A mixture of experts of 8 x 7B parameters (Mixtral's shape), 8k -> 128k tokens: 8 nodes of 8 GPUs with 80 GB.
set -euo pipefail
source "$(dirname "$0")/common.sh"

NAME=moe_8x7b NODES=8 VOCABULARY=32000
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
    --num-experts 8
    --moe-router-topk 2
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.01
    --moe-token-dispatcher-type alltoall
    --bf16
)
LAYOUT=( # 16k tokens of a sequence on a rank, 4k of them between the layers; an expert on a rank
    --tensor-model-parallel-size 4
    --sequence-parallel
    --pipeline-model-parallel-size 2
    --context-parallel-size 8
    --expert-model-parallel-size 8
    --expert-tensor-parallel-size 1
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
