#!/usr/bin/env bash
# A mixture of experts of 8 x 7B parameters (Mixtral's shape), 8k -> 128k tokens: 8 nodes of 8 GPUs with 80 GB.
set -euo pipefail
source "$(dirname "$0")/../common.sh"

shape mixtral_8x7b
continue_checkpoint
defaults SEQ_LENGTH=131072 TRAIN_ITERS=1000 GLOBAL_BATCH_SIZE=32 LR=2e-5 WARMUP_FRACTION=0.02 ROTARY_BASE=1000000
defaults SAVE_INTERVAL=100
EVAL_ITERS=${EVAL_ITERS:-0}
on_gpus NNODES=8 TP=4 PP=2 CP=8 EP=8 # 16k tokens of a sequence on a rank, 4k of them between the layers
on_cpu CP=2
# Recomputation keeps one layer's activations at a time.
start --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "$@"
