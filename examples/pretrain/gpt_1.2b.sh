#!/usr/bin/env bash
# The 1.2B model of the FoPE paper (arXiv 2412.17739): 16 layers, 2048 channels, 16 heads of 128.
# From the authors' configurations (TsinghuaC3I/Fourier-Position-Embedding at bd94b20, configs/c4): shape, gain 0.6,
#   lengths 512 and 1024, 524288 tokens a step, sequences a GPU, learning rate, 10000 steps of warmup, weight decay, seed.
# From the paper: 10 billion tokens of C4, here 19073 steps.
# Ours: Megatron's way of initialising and of leaving norms out of weight decay, and its distributed optimizer.
# SEQ_LENGTH=1024 is the authors' other length. Parameters, by arithmetic: 1.07B without embeddings, 1.18B with one of the two.
set -euo pipefail
source "$(dirname "$0")/../common.sh"

shape olmo_1.2b
defaults SEQ_LENGTH=512 TRAIN_ITERS=19073 LR=6e-4 WARMUP_FRACTION=0.5243 ROTARY_BASE=10000 GAIN=0.6
on_gpus NNODES=1 MICRO_BATCH_SIZE=$((8 * 512 / SEQ_LENGTH)) GLOBAL_BATCH_SIZE=$((524288 / SEQ_LENGTH))
on_cpu # two data-parallel processes
start --seed 6198 "$@"
