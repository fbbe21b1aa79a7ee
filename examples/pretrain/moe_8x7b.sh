#!/usr/bin/env bash
# Pre-train a mixture of experts of 8 x 7B parameters (Mixtral's shape) at 8k tokens, 4.2 million tokens a step.
# From 4 nodes of 8 GPUs with 80 GB. Everything but the shape is our choice; FoPE's gain is the paper's largest.
set -euo pipefail
source "$(dirname "$0")/../common.sh"

shape mixtral_8x7b
defaults SEQ_LENGTH=8192 TRAIN_ITERS=250000 LR=3e-4 ROTARY_BASE=1000000 GAIN=0.6
on_gpus NNODES=8 TP=2 PP=4 CP=$((SEQ_LENGTH > 8192 ? SEQ_LENGTH / 8192 : 1)) EP=8 GLOBAL_BATCH_SIZE=512 # an expert on a rank
on_cpu EP=2
start "$@"
