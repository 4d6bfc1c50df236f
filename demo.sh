#!/usr/bin/env bash
# The whole job through its notebooks, one papermill call a stage: ./demo.sh [config]
# The executed notebooks, their output and their logs go to runs/notebooks/; the screen shows what matters of them.
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

# Lines that match a pattern, each with the lines on which its sentence continues: text is wrapped at 100 columns
show() {
  awk -v pattern="$1" 'continues || $0 ~ pattern { print; fflush(); continues = length($0) > 85; next }'
}

# stage TITLE NOTEBOOK LINES [more arguments of papermill]: LINES is a pattern of the lines to show
stage() {
  local title=$1 notebook=$2 lines=$3 start=$SECONDS
  number=$((number + 1))
  local name=${number}_$notebook
  printf '\n%d/7 %s …\n' "$number" "$title"
  if ! papermill "$notebook.ipynb" "$out/$name.ipynb" -p config "$config" "${@:4}" \
         --no-progress-bar --stdout-file - 2>"$out/$name.log" | from_root | tee "$out/$name.txt" | show "$lines"; then
    tail -n 40 "$out/$name.log"
    echo "stopped at $notebook.ipynb: see runs/notebooks/$name.ipynb"
    exit 1
  fi
  printf '%d/7 %s: %d s\n' "$number" "$title" $((SECONDS - start))
}

cd "$root/nbs"
stage 'data checks' 04i_check    '^(toy:|READY|NOT READY|ERROR)'
stage 'training'    05_train     'epoch |fit .* epochs|stopped'
stage 'validation'  05a_evaluate '^views|^  1:' -p split val -p views none,minimal
stage 'calibration' 06_calibrate 'calibrated by|not calibrated|test-time augmentation'
stage 'test'        05a_evaluate '^  1:' -p split test
stage 'report'      07_report    '.'
stage 'map'         08z_map      '^(map of|objects:|area:|precision of|recall of|preview:)'
cat <<END

all output: runs/notebooks/
next:       open the report and the preview of the map in a browser
            make seeds                                        the same for three seeds, and one report over them
            source .venv/bin/activate
            rtsseg plan --folder FIELDS --out fields.yaml     a config for your own images and masks
            rtsseg run --config fields.yaml                   and from there to a report
END
