#!/usr/bin/env bash
# Every row that a GPU has to answer for, in one go of under ten minutes: `bench/gpu.sh [FOLDER]` leaves a JSON file, a picture and
# the table of each framework in FOLDER. What does not fit into the time says so. Settings: PYTHON, BACKENDS, DEVICE, SECONDS_IN_ALL.
set -uo pipefail
cd "$(dirname "$0")/.."

folder=${1:-bench-output}
python=${PYTHON:-python3}
backends=${BACKENDS:-torch jax}
device=${DEVICE:-cuda}
seconds=${SECONDS_IN_ALL:-540}
mkdir -p "$folder"

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$folder/gpu.csv" 2>&1 || true
deadline=$((SECONDS + seconds))
measure() {  # NAME SHARE_OF_WHAT_IS_LEFT ARGUMENTS...
  local name=$1 budget=$(((deadline - SECONDS) * $2 / 100))
  shift 2
  ((budget > 20)) || { echo "$name: no time left" >&2; return; }
  # A row that has begun may still take its own time, so the whole is cut off a little later.
  timeout --kill-after=10 $((budget + 20)) "$python" -m bdh_bench.cli "$@" --device "$device" --rounds 5 --budget "$budget" \
    --max-seconds $((budget / 3 > 20 ? budget / 3 : 20)) --json "$folder/$name.json" >"$folder/$name.txt" 2>"$folder/$name.log" ||
    echo "$name: status $?" >&2
  cat "$folder/$name.txt"
}

for backend in $backends; do
  # The rows of the table of targets first, then the others.
  measure "$backend-bf16-targets" 40 all --backend "$backend" --dtype bfloat16 \
    --rows "train B=32 T=512,prefill T=32768,decode B=1 context=512,decode B=64 context=512"
  measure "$backend-bf16-forward" 40 forward --backend "$backend" --dtype bfloat16 --plot "$folder/$backend-bf16.png" --rows "forward T=*"
  measure "$backend-f32" 50 all --backend "$backend" --dtype float32 \
    --rows "forward T=2048,train B=4 T=512,decode B=1 context=512,decode B=1 context=100000"
done
