#!/usr/bin/env bash
# Pre-train a dense model of 8B parameters (Llama 3's shape) at 8k tokens, 4.2 million tokens a step, 1 trillion in all.
# From 1 node of 8 GPUs with 80 GB. Everything but the shape is our choice; FoPE's gain is the paper's largest.
set -euo pipefail
source "$(dirname "$0")/../common.sh"

shape llama_8b
defaults SEQ_LENGTH=8192 TRAIN_ITERS=250000 LR=3e-4 ROTARY_BASE=500000 GAIN=0.6
on_gpus NNODES=4 TP=2 CP=$((SEQ_LENGTH > 8192 ? SEQ_LENGTH / 8192 : 1)) GLOBAL_BATCH_SIZE=512 # 8k tokens of a sequence on a rank
on_cpu TP=2
start "$@"
