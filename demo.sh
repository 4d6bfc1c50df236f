#!/usr/bin/env bash
# The main job through the notebooks, one papermill call a stage: ./demo.sh [config]. Executed notebooks go to runs/notebooks/.
set -euo pipefail
config=$(realpath -s "${1:-$(dirname "$0")/configs/toy.yaml}"); cd "$(dirname "$0")/nbs"
out=../runs/notebooks; n=0
mkdir -p $out; export PATH=$(cd .. && pwd)/.venv/bin:$PATH NO_ALBUMENTATIONS_UPDATE=1 OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1

stage() {   # what it is, notebook, more parameters; the log is shown where something goes wrong
  local start=$SECONDS name=$((++n))_$2
  printf '\n%d/6 %s …\n' $n "$1"
  papermill "$2.ipynb" $out/$name.ipynb -p config "$config" "${@:3}" --no-progress-bar --stdout-file - 2>$out/$name.log | sed -un '1,/^This run$/!p' || {   # what the chapter shows before is for its readers
    tail -n 40 $out/$name.log; echo "stopped at $2.ipynb: see runs/notebooks/$name.ipynb"; exit 1; }
  printf '%d/6 %s: %d s\n' $n "$1" $((SECONDS - start))
}

stage 'data checks'             04i_check
stage 'training'                05_train
stage 'validation'              05a_evaluate -p split val
stage 'calibration'             06_calibrate
stage 'test'                    05a_evaluate -p split test
stage 'report'                  07_report
echo; cd .. && rtsseg-report --config "$config"
