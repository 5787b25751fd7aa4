#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes: what the machine is, whether the kernels are right on it,
# and how fast they are. A failing stage does not stop the others; failures are listed at the end, and are the exit status.
#
#   bench/gpu_session.sh                 results in bench/results/gpu-<date>, or in $OUT
#   STAGES="environment step"            these stages alone, in this order; `generate`, a model of 8 layers, and `sweep`, a step
#                                        with each of some configurations of its kernels, are no part of the rest
#   PYTHON=... WHEELS=folder             another interpreter; wheels to install beforehand, without a network
#   SIZES=131072x1,131072x8              tokens and batch sizes of the stage `step`, LIMIT=520 seconds for everything
#   RECORDING=file                       of `bench/gpu_replay.py record`, for the stage `bisect`; else it is made here, by g++
#   DRY=1                                the same stages on the emulated device, tiny
#
# All logs and figures are in session.tgz; beside it lie failures.txt and the tables of the stages, six files at most.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu-$(date +%F)}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d)
trap pack EXIT
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ] && [ -n "${DRY:-}" ]; then PYTHON=.venv/bin/python; fi
fi
export PYTHONPATH="$PWD:$PWD/tests:$PWD/tests/cuda${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
export CUPY_CACHE_DIR=${CUPY_CACHE_DIR:-$(mktemp -d)} # the home folder may not be writable
BEGAN=$(date +%s)
[ -n "${DRY:-}" ] && LIMIT=${LIMIT:-1500}
LIMIT=${LIMIT:-520} # seconds for everything
STAGES=${STAGES:-environment primitives bisect memcheck step codes model host build tests racecheck}
FAILED=()
dry=${DRY:+--dry}
FEW=131072x1,131072x8 # sizes of the stages `codes` and `sweep`
SWEEP="scan:SAAP_STAGES=2;scan:SAAP_WARPS=6,scan:SAAP_STAGES=4;scan:SAAP_WARPS=4,scan:SAAP_STAGES=4"
SWEEP+=";scan:SAAP_BLOCKS=2,scan:SAAP_WARPS=4,scan:SAAP_STAGES=2;scan:SAAP_TILE=32,scan:SAAP_WARPS=4,scan:SAAP_STAGES=3"
SWEEP+=";route_select:SAAP_CLUSTER=4;route_select:SAAP_THREADS=256"
if [ -n "$dry" ]; then FEW=160x1 SWEEP="scan:SAAP_STAGES=2"; fi

# Whatever happens, what there is goes back, in few files.
pack() {
  tar -C "$WORK" -czf "$OUT/session.tgz" . 2>/dev/null
  for name in failures.txt environment.json gpu_step.txt gpu_step.json gpu_build.txt gpu_build.json; do
    [ -f "$WORK/$name" ] && cp "$WORK/$name" "$OUT/$name"
  done
  rm -rf "$WORK" "${WORK%/}.npz"
}

# stage NAME SECONDS COMMAND...: its output goes to NAME.log and, shortened, to the terminal.
stage() {
  local name=$1 most=$2 left status
  shift 2
  left=$((LIMIT - ($(date +%s) - BEGAN)))
  if [ "$left" -lt 5 ]; then
    FAILED+=("$name: no time left")
    return 1
  fi
  [ -n "$dry" ] && most=$((8 * most)) # nothing is measured then, on a machine that may have other work
  [ "$left" -lt "$most" ] && most=$left
  echo "== $name ($most s at most)"
  timeout --kill-after=10 "$most" "$@" >"$WORK/$name.log" 2>&1
  status=$?
  tail -n "${LINES_SHOWN:-12}" "$WORK/$name.log"
  if [ "$status" -ne 0 ]; then
    FAILED+=("$name: exit status $status (124: out of time), see $name.log")
  fi
  echo "   $(($(date +%s) - BEGAN)) s so far"
  return "$status"
}

if [ -n "${WHEELS:-}" ]; then
  SITE=$(mktemp -d)
  stage wheels 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl
  export PYTHONPATH="$PYTHONPATH:$SITE"
  if ls "$WHEELS"/flashinfer*.whl >/dev/null 2>&1; then # compiles its kernels at first use, for a minute or more
    export FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$(mktemp -d)}
    timeout --kill-after=10 200 "$PYTHON" bench/gpu_baselines.py $dry >"$WORK/flashinfer.log" 2>&1 &
    FLASHINFER=$!
  fi
fi

# A baseline that does not compile is left out, and is no failure of ours.
ready() {
  if [ -n "${FLASHINFER:-}" ] && ! wait "$FLASHINFER"; then
    echo "== FlashInfer is left out: $(tail -n 1 "$WORK/flashinfer.log")"
    export SAAP_LEAVE_OUT=flashinfer
  fi
  FLASHINFER=
}

SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider -W default -m gpu --durations=8 ${DRY:+--collect-only})

# Our kernels alone; every tensor an allocation of its own, so that the end of one is an end; and no word of the questions that
# libraries ask the driver about what it may not have.
sanitized() {
  env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --kernel-name kns=saap_ --report-api-errors no --error-exitcode 9 "$@"
}
export -f sanitized
export SANITIZER

check() { # check TOOL: a small program under compute-sanitizer
  if [ -n "$SANITIZER" ]; then
    stage "$1" 90 bash -c "sanitized --tool $1 $PYTHON bench/gpu_small.py $dry"
  elif [ -z "$dry" ]; then
    echo "== $1: compute-sanitizer not found, left out"
  fi
}

# Each file in a process of its own, all at once: an illegal access fails every later call of its process. Most of the time goes
# into compiling. What failed first runs again alone, under memcheck.
tests() {
  local file names=() jobs=() first
  for file in tests/cuda/test_gpu_backend.py tests/cuda/test_gpu_graphs.py tests/cuda/test_gpu_walk.py tests/hf/test_hf_graphs.py $(ls tests/cuda/test_gpu_hardware*.py 2>/dev/null); do
    names+=("$(basename "$file" .py)")
    (timeout --kill-after=10 230 "${PYTEST[@]}" "$file" >"$WORK/$(basename "$file" .py).log" 2>&1; echo $? >"$WORK/$(basename "$file" .py).status") &
    jobs+=($!)
  done
  echo "== tests: ${names[*]}"
  wait "${jobs[@]}" # these alone: who else runs in the background is waited for where it is needed
  for name in "${names[@]}"; do
    tail -n 6 "$WORK/$name.log"
    [ "$(cat "$WORK/$name.status")" = 0 ] && continue
    FAILED+=("$name: exit status $(cat "$WORK/$name.status"), see $name.log")
    # where the process itself ended there is no such line: the file, up to its first failure
    first=$(grep -m1 -oE '^(FAILED|ERROR) [^ ]+::[^ ]+' "$WORK/$name.log" | cut -d' ' -f2)
    first=${first:-$(ls tests/*/$name.py) -x}
    if [ -n "$SANITIZER" ]; then
      stage "again-$name" 100 bash -c "CUDA_LAUNCH_BLOCKING=1 sanitized --tool memcheck ${PYTEST[*]} $first"
    fi
  done
  echo "   $(($(date +%s) - BEGAN)) s so far"
}

# Every launch of a step alone, from recorded memory: names the kernel that is wrong. A recording is made while the first stages
# run; it needs the processor only.
if [[ " $STAGES " == *" bisect "* ]] && [ -z "${RECORDING:-}" ]; then
  RECORDING=${WORK%/}.npz
  timeout --kill-after=10 200 "$PYTHON" bench/gpu_replay.py record "$RECORDING" $dry >"$WORK/record.log" 2>&1 &
  RECORDER=$!
fi

bisect() {
  if [ -n "${RECORDER:-}" ] && ! wait "$RECORDER"; then
    FAILED+=("record: exit status not 0, see record.log; or bring one: RECORDING=file")
    tail -n 3 "$WORK/record.log"
    return
  fi
  stage bisect 90 "$PYTHON" bench/gpu_replay.py replay "$RECORDING" $dry
}

for name in $STAGES; do
  case $name in
  environment) LINES_SHOWN=30 stage environment 60 "$PYTHON" bench/gpu_environment.py $dry --out "$WORK" ;;
  primitives) stage primitives 60 "${PYTEST[@]}" tests/cuda/test_primitives.py ;;
  bisect) bisect ;;
  model) LINES_SHOWN=40 stage model 30 "$PYTHON" bench/gpu_model.py --recorded --measured "$WORK" ;;
  step)
    ready
    LINES_SHOWN=110 stage step 200 "$PYTHON" bench/gpu_step.py $dry --out "$WORK" --budget 150 ${SIZES:+--sizes "$SIZES"}
    ;;
  codes)
    LINES_SHOWN=20 stage codes 60 "$PYTHON" bench/gpu_step.py $dry --storage SQ8,SQ8/SQ4 --sizes "$FEW" --out "$WORK"
    ;;
  sweep)
    LINES_SHOWN=40 stage sweep 120 "$PYTHON" bench/gpu_step.py $dry --sweep "$SWEEP" --sizes "$FEW" --out "$WORK"
    ;;
  host) stage host 30 "$PYTHON" bench/gpu_host.py --out "$WORK" ;;
  build) LINES_SHOWN=40 stage build 60 "$PYTHON" bench/gpu_build.py $dry --out "$WORK" --budget 45 ;;
  generate) LINES_SHOWN=40 stage generate 120 "$PYTHON" bench/gpu_generate.py $dry --out "$WORK" ;;
  tests) tests ;;
  memcheck | racecheck) check "$name" ;;
  *) FAILED+=("$name: no such stage") ;;
  esac
done

echo
if [ ${#FAILED[@]} -gt 0 ]; then
  printf 'FAILED %s\n' "${FAILED[@]}" | tee "$WORK/failures.txt"
  exit 1
fi
rm -f "$OUT/failures.txt"
echo "every stage passed; results in $OUT"
