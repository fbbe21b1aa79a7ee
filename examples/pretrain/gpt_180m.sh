#!/usr/bin/env bash
# The 180M model of the FoPE paper (arXiv 2412.17739): 8 layers, 1024 channels, 8 heads of 128.
# From the authors' configurations (TsinghuaC3I/Fourier-Position-Embedding at bd94b20, configs/c4): shape, gain 0.4,
#   lengths 512 and 1024, 524288 tokens a step, sequences a GPU, learning rate, 10000 steps of warmup, weight decay, seed.
# From the paper: 10 billion tokens of C4, here 19073 steps.
# Ours: Megatron's way of initialising and of leaving norms out of weight decay, and its distributed optimizer.
# SEQ_LENGTH=1024 is the authors' other length. Parameters, by arithmetic: 134M without embeddings, 186M with one of the two.
set -euo pipefail
source "$(dirname "$0")/../common.sh"

shape olmo_180m
defaults SEQ_LENGTH=512 TRAIN_ITERS=19073 LR=6e-4 WARMUP_FRACTION=0.5243 ROTARY_BASE=10000 GAIN=0.4
on_gpus NNODES=1 MICRO_BATCH_SIZE=$((32 * 512 / SEQ_LENGTH)) GLOBAL_BATCH_SIZE=$((524288 / SEQ_LENGTH))
on_cpu # two data-parallel processes
start --seed 6198 "$@"
