#!/usr/bin/env bash
# Pre-train a dense model of 70B parameters (Llama 3's shape) at 8k tokens, 8.4 million tokens a step, 1 trillion in all.
# From 8 nodes of 8 GPUs with 80 GB. Everything but the shape is our choice; FoPE's gain is the paper's largest.
set -euo pipefail
source "$(dirname "$0")/../common.sh"

shape llama_70b
defaults SEQ_LENGTH=8192 TRAIN_ITERS=125000 LR=1.5e-4 ROTARY_BASE=500000 GAIN=0.6
on_gpus NNODES=32 TP=8 PP=4 CP=$((SEQ_LENGTH > 8192 ? SEQ_LENGTH / 8192 : 1)) GLOBAL_BATCH_SIZE=1024
on_cpu PP=2
start "$@"
