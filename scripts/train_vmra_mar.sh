#!/usr/bin/env bash
# VMRA-MaR as guide 004 trains it: what has a default stays at it, and further flags follow the name of the script.
# Several GPUs: LAUNCH="accelerate launch" bash scripts/train_vmra_mar.sh
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python} main_train.py \
  --model VMRA-MaR \
  --dataset "${DATASET:-EMBED}" \
  --csv_file "${CSV_FILE:-data/mammograms/exams.csv}" \
  --data_root "${DATA_ROOT:-data/mammograms}" \
  --path_out_dir "${PATH_OUT_DIR:-results/risk}" \
  "$@"
