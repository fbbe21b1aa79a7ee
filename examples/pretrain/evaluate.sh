#!/usr/bin/env bash
# Perplexity over context lengths, and retrieval by length and depth, of one or more checkpoints side by side.
# CHECKPOINTS="RoPE=out/pretrain/gpt_60m-rope/checkpoints FoPE=out/pretrain/gpt_60m-fope/checkpoints" \
#     DATA_PATH=data/c4_heldout examples/pretrain/evaluate.sh [flags of both commands]
# LENGTHS, by default 0.5 (retrieval: 1) to 16 times the first checkpoint's train length; TASK, SAMPLES: the retrieval's.
set -euo pipefail
source "$(dirname "$0")/../common.sh"

defaults OUT=out/evaluation TASK=needle SAMPLES=20
whole SAMPLES 1
[[ ${LENGTHS:-1} =~ ^[1-9][0-9]*(,[1-9][0-9]*)*$ ]] ||
    die "LENGTHS is '$LENGTHS'; allowed: numbers of tokens, for example 512,1024"
[[ $TASK == needle || $TASK == recall || $TASK == passkey ]] ||
    die "TASK is '$TASK'; allowed: needle, recall or passkey"
require CHECKPOINTS "folders made by --save, each with or without a NAME= in front"
read -ra folders <<< "$CHECKPOINTS"
common=()
for folder in "${folders[@]}"; do
    [[ -f ${folder#*=}/latest_checkpointed_iteration.txt ]] ||
        die "CHECKPOINTS: ${folder#*=} is not a folder made by --save"
    common+=(--checkpoint "$folder")
done

if switch MOCK; then # random tokens, and pairs of a key and its value between them
    DATA_PATH=$OUT/mock TASK=recall
    run megatron-fope make-recall-data --output-prefix "$DATA_PATH" --overwrite --length 128 --documents 256
else
    require DATA_PATH "a held-out data set: the prefix of .bin/.idx; prepare-data --holdout-fraction makes one"
    _files_of DATA_PATH "$DATA_PATH"
fi
common+=(--data-path "$DATA_PATH")
[[ -z ${LENGTHS:-} ]] || common+=(--lengths "$LENGTHS")
! switch CPU || common+=(--cpu)

run megatron-fope evaluate-perplexity "${common[@]}" \
    --output "$OUT/perplexity.json" --csv "$OUT/perplexity.csv" "$@"
run megatron-fope evaluate-retrieval "${common[@]}" --task "$TASK" --samples "$SAMPLES" \
    --output "$OUT/retrieval.json" --csv "$OUT/retrieval.csv" "$@"
