#!/usr/bin/env bash
# The whole job through its notebooks, one papermill call a stage: ./demo.sh [config]
# The executed notebooks and their logs go to runs/notebooks/.
set -euo pipefail
config=$(realpath -s "${1:-$(dirname "$0")/configs/toy.yaml}")
cd "$(dirname "$0")"
root=$PWD
out=$root/runs/notebooks
export PATH=$root/.venv/bin:$PATH
export NO_ALBUMENTATIONS_UPDATE=1 OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1 PYTHONHASHSEED=42
mkdir -p "$out"
number=0

# Chapters run in nbs/, and print paths from there
from_root() {
  sed -u 's|\.\./runs/|runs/|g'
}

# stage TITLE NOTEBOOK [more arguments of papermill]
stage() {
  local title=$1 notebook=$2 start=$SECONDS
  number=$((number + 1))
  local name=${number}_$notebook
  printf '\n%d/6 %s …\n' "$number" "$title"
  if ! papermill "$notebook.ipynb" "$out/$name.ipynb" -p config "$config" "${@:3}" \
         --no-progress-bar --stdout-file - 2>"$out/$name.log" | from_root; then
    tail -n 40 "$out/$name.log"
    echo "stopped at $notebook.ipynb: see runs/notebooks/$name.ipynb"
    exit 1
  fi
  printf '%d/6 %s: %d s\n' "$number" "$title" $((SECONDS - start))
}

cd "$root/nbs"
stage 'data checks' 04i_check
stage 'training'    05_train
stage 'validation'  05a_evaluate -p split val
stage 'calibration' 06_calibrate
stage 'test'        05a_evaluate -p split test
stage 'report'      07_report
