#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes: what the machine is, whether the kernels are right on it,
# and how fast they are. A failing stage does not stop the others; failures are listed at the end, and are the exit status.
#
#   bench/gpu_session.sh                 results in bench/results/gpu-<date>, or in $OUT
#   PYTHON=... WHEELS=folder             another interpreter; wheels to install beforehand, without a network
#   DRY=1                                the same stages on the emulated device, tiny
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu-$(date +%F)}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ] && [ -n "${DRY:-}" ]; then PYTHON=.venv/bin/python; fi
fi
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
BEGAN=$(date +%s)
LIMIT=${LIMIT:-520} # seconds for everything
FAILED=()
dry=${DRY:+--dry}

# stage NAME SECONDS COMMAND...: its output goes to NAME.log and, shortened, to the terminal.
stage() {
  local name=$1 most=$2 left status
  shift 2
  left=$((LIMIT - ($(date +%s) - BEGAN)))
  if [ "$left" -lt 5 ]; then
    FAILED+=("$name: no time left")
    return
  fi
  [ "$left" -lt "$most" ] && most=$left
  echo "== $name ($most s at most)"
  timeout --kill-after=10 "$most" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  tail -n "${LINES_SHOWN:-12}" "$OUT/$name.log"
  if [ "$status" -ne 0 ]; then
    FAILED+=("$name: exit status $status (124: out of time), see $name.log")
  fi
  echo "   $(($(date +%s) - BEGAN)) s so far"
}

if [ -n "${WHEELS:-}" ]; then
  SITE=$(mktemp -d)
  stage wheels 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl
  export PYTHONPATH="$PYTHONPATH:$SITE"
fi

LINES_SHOWN=30 stage environment 40 "$PYTHON" bench/gpu_environment.py $dry --out "$OUT"
PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider -W default -m gpu --durations=8 ${DRY:+--collect-only})
stage primitives 60 "${PYTEST[@]}" tests/test_primitives.py
WORKERS=() # of pytest-xdist, where it is there: most of the time goes into compiling kernels
if [ -z "$dry" ] && "$PYTHON" -c 'import xdist' 2>/dev/null; then WORKERS=(-n 4); fi
stage tests 200 "${PYTEST[@]}" "${WORKERS[@]}" tests/test_gpu_backend.py tests/test_gpu_graphs.py tests/test_gpu_walk.py
LINES_SHOWN=80 stage search_attend 170 "$PYTHON" bench/gpu_search_attend.py $dry --out "$OUT" --budget 120
LINES_SHOWN=40 stage build 60 "$PYTHON" bench/gpu_build.py $dry --out "$OUT" --budget 45
if SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
  # Our kernels alone; every tensor an allocation of its own, so that the end of one is an end; and no word of the questions
  # that libraries ask the driver about what it may not have.
  CHECK=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --kernel-name kns=saap_ --report-api-errors no --error-exitcode 9)
  for tool in memcheck racecheck; do
    stage "$tool" 60 "${CHECK[@]}" --tool "$tool" "$PYTHON" bench/gpu_small.py $dry
  done
elif [ -z "$dry" ]; then
  echo "== compute-sanitizer: not found, left out"
fi

echo
if [ ${#FAILED[@]} -gt 0 ]; then
  printf 'FAILED %s\n' "${FAILED[@]}" | tee "$OUT/failures.txt"
  exit 1
fi
rm -f "$OUT/failures.txt"
echo "every stage passed; results in $OUT"
