#!/usr/bin/env bash
# LMV-Net as guide 004 trains it. Several GPUs: LAUNCH="accelerate launch" bash scripts/train_lmv_net.sh; further flags follow the name of the script.
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python} main_train.py \
  --model LMV-Net \
  --dataset "${DATASET:-EMBED}" \
  --csv_file "${CSV_FILE:-data/mammograms/exams.csv}" \
  --data_root "${DATA_ROOT:-data/mammograms}" \
  --path_out_dir "${PATH_OUT_DIR:-results/risk}" \
  --num_epochs 100 \
  --batch_size 12 \
  --learning_rate 5e-5 \
  --weight_decay 1e-4 \
  --warmup_steps 5000 \
  --use_scheduler True \
  --patience_lr_scheduler 5 \
  --lr_decay 0.5 \
  --patience 15 \
  --augmentations True \
  --seed 2023 \
  "$@"
