#!/usr/bin/env bash
# The first fifteen minutes on a rented GPU, planned: build, smoke tests, GPU tests, sanitizers, benchmarks, a profile.
#
#   benchmarks/gpu_quick.sh                     all steps, in order
#   benchmarks/gpu_quick.sh --failed FILE       only what did not pass in FILE, the steps.tsv of an earlier run
#   benchmarks/gpu_quick.sh --only STEP ...     some steps
#   benchmarks/gpu_quick.sh --plan              the steps with their estimated seconds; nothing runs
#   benchmarks/gpu_quick.sh --dry [--only ...]  every step on tiny data, on the CPU: that the plumbing holds
#
# Each step runs in processes of its own under a time limit and is written to $OUT/steps.tsv when it ends; one that fails
# or hangs costs its limit and no more. A step whose need did not pass is skipped. All must fit in LIMIT seconds (560);
# steps that would begin later are skipped. docs/gpu.md says how to rent, run, and what to send back.
#
# OUT      where results go (out-gpu): steps.tsv, log.txt, gpu-<device>.json, profile.txt
# WHEELS   a folder of wheels for packages that the machine lacks, such as pykeops (.wheels)
# IMAGES   a folder or tar of training images (smooth random ones without)
# PYTHON   the interpreter that has torch (python3)
set -u
cd "$(dirname "$0")/.." || exit 2
ROOT=$PWD
OUT=${OUT:-$ROOT/out-gpu} WHEELS=${WHEELS:-$ROOT/.wheels} PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-560}
IMAGES=${IMAGES:-}

# name  estimated seconds, on an H100 with 16 cores  limit  needs  command
plan() {
    cat <<'STEPS'
machine           12  40  -                 machine
build             25  80  -                 build kernels
smoke-fused       12  20  machine           smoke fused
smoke-split        9  20  machine           smoke fused-split
smoke-exact        9  20  machine           smoke fused-exact
smoke-blocks       9  20  machine           smoke fused-blocks
smoke-circular     7  20  build             smoke sliding-circular
smoke-zeros        7  20  build             smoke sliding-zeros
smoke-local        7  20  build             smoke sliding-local
smoke-floats       7  20  build             smoke sliding-floats
smoke-moments      7  20  build             smoke sliding-moments
smoke-gradients    7  20  build             smoke sliding-gradients
smoke-whole        7  20  build             smoke whole-images
build-native      45 110  -                 build native
smoke-pruned       8  20  build-native      smoke pruned
smoke-heavy        8  20  build-native      smoke pruned-moments
smoke-latents      8  20  build-native      smoke pruned-floats
tests-fused       45 110  smoke-fused       tests fused
tests-pruned      20  50  smoke-pruned      tests pruned
tests-sliding     40  90  smoke-circular    tests sliding
synccheck-sliding 10  30  smoke-circular    sanitize synccheck sliding-circular
memcheck-sliding  15  35  smoke-zeros       sanitize memcheck sliding-zeros
racecheck-sliding 12  35  smoke-circular    sanitize racecheck sliding-circular
memcheck-fused    15  40  smoke-exact       sanitize memcheck fused-exact
memcheck-pruned   15  40  smoke-pruned      sanitize memcheck pruned
bench-fused       60 110  smoke-fused       bench ceilings peers batches graph
bench-pruned      40  80  smoke-pruned      bench pruned
bench-sliding     25  50  smoke-circular    bench sliding
samples           25  70  smoke-fused       bench samples
bench-specialised 20  60  smoke-fused       bench specialised configurations
profile           20  45  smoke-fused       profile fused sliding-circular pruned
STEPS
}

DRY= FAILED= ONLY= SHOW=
while [ $# -gt 0 ]; do
    case $1 in
        --dry) DRY=--dry ;;
        --plan) SHOW=1 ;;
        --failed) FAILED=${2:?--failed takes a steps.tsv}; shift ;;
        --only) shift; ONLY=" $* "; break ;;
        *) echo "$1: not an option; see the head of $0" >&2; exit 2 ;;
    esac
    shift
done
[ -z "$FAILED" ] || [ -f "$FAILED" ] || { echo "$FAILED: not found" >&2; exit 2; }
for name in $ONLY; do
    plan | grep -q "^$name " || { echo "$name: not a step; --plan lists them" >&2; exit 2; }
done

# What each step does. Exit status 0: passed; 77: this machine has no such tool; else failed.

machine() {
    nvidia-smi || true
    if ls "$WHEELS"/*.whl >/dev/null 2>&1; then
        $PYTHON -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$SITE" "$WHEELS"/*.whl ||
            echo "no wheel was installed"
    fi
    $PYTHON - <<'PYTHON'
import importlib.metadata as metadata, os, sys
import torch
found = {}
for name in ("torch", "triton", "numpy", "faiss-cpu", "pykeops", "pytest", "pybind11", "setuptools"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = "missing"
print(sys.version.split()[0], os.cpu_count(), "cores", found)
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), torch.ones(1, device="cuda").item())
elif os.environ["DRY"] == "":
    sys.exit("torch sees no CUDA device")
PYTHON
}

# The kernels, or the C++ engines, which a dry run takes for both. Without pyproject.toml, whose licence line old
# setuptools refuse, and so without metadata: only the extensions.
build() {
    local name=_sliding_cuda cuda=1 native=0 suffix stage=$SITE/stage
    if [ "$1" = native ] || [ -n "$DRY" ]; then name=_native cuda=0 native=1; fi
    suffix=$($PYTHON -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))') || return 1
    if [ -f "patchscore/$name$suffix" ]; then echo "already built"; return; fi
    mkdir -p "$stage" && ln -sfn "$ROOT/patchscore" "$ROOT/csrc" "$ROOT/setup.py" "$stage" || return 1
    (cd "$stage" && time PATCHSCORE_CUDA=$cuda PATCHSCORE_NATIVE=$native NPY_NUM_BUILD_JOBS=0 \
        $PYTHON setup.py -q build_ext --inplace)
    # An extension that does not compile is left out without an error.
    ls -l "patchscore/$name$suffix"
}

smoke() { $PYTHON benchmarks/gpu_smoke.py "$1" $DRY; }

# Tests that all skip themselves are no pass. The name of a test that hangs is the last in the log.
tests() {
    $PYTHON -m pytest -vv -m gpu -p no:cacheprovider -rs --durations 5 tests/test_*"$1"*.py | tee "$OUT/tests.log"
    local code=${PIPESTATUS[0]}
    grep -qE '[0-9]+ passed' "$OUT/tests.log" || [ -n "$DRY" ] || { echo "no GPU test ran"; code=1; }
    rm -f "$OUT/tests.log"
    return "$code"
}

sanitize() {
    command -v compute-sanitizer >/dev/null || return 77
    compute-sanitizer --tool "$1" --error-exitcode 9 $PYTHON benchmarks/gpu_smoke.py "$2"
}

# Begins nothing in the last quarter of its limit, so that what is done is shown.
bench() {
    $PYTHON benchmarks/gpu.py --quick $DRY --seconds $((SECONDS_HERE * 3 / 4)) ${IMAGES:+--images "$IMAGES"} --only "$@"
}

profile() {
    command -v ncu >/dev/null || return 77
    for case in "$@"; do
        ncu --kernel-name 'regex:(dense|posterior|windows|plan|scan)_kernel' --launch-count 1 --set basic \
            --section WarpStateStats --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis \
            $PYTHON benchmarks/gpu_smoke.py "$case" --large || return 1
    done >"$OUT/profile.txt" 2>&1
}

# The run.

total=$(plan | awk '{ s += $2 } END { print s }')
[ "$total" -le "$LIMIT" ] || [ -n "$FAILED$ONLY" ] || { echo "the plan takes $total s, more than LIMIT=$LIMIT" >&2; exit 2; }
if [ -n "$SHOW" ]; then
    plan | awk '{ printf "%-18s %4d s, at most %4d s\n", $1, $2, $3 }'
    echo "together $total s of $LIMIT"
    exit
fi

mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
SITE=${TMPDIR:-/tmp}/patchscore-gpu-quick
export OUT DRY SITE WHEELS PYTHON IMAGES ROOT
export PYTHONPATH=$ROOT:$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PATCHSCORE_RESULTS=$OUT PATCHSCORE_STRICT=1
export PATCHSCORE_CACHE=$SITE/tuned
[ -z "$DRY" ] || export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
export -f machine build smoke tests sanitize bench profile

declare -A status
earlier() { awk -F'\t' -v name="$1" '$1 == name { s = $2 } END { print s }' "$FAILED"; }
wanted() {
    if [ -n "$ONLY" ]; then [[ $ONLY == *" $1 "* ]]; return; fi
    # What a bare machine lacks is made again.
    [ -z "$FAILED" ] || [ "$1" = machine ] || [ "$1" = build ] || [[ $(earlier "$1") != @(passed|absent) ]]
}
note() {
    status[$1]=$2
    printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" "$5" >>"$OUT/steps.tsv"
    printf '%-18s %-8s %4s s (estimated %s) %s\n' "$1" "$2" "$3" "$4" "$5"
}

# What the earlier run measured stays, but for the sections that run again.
[ -z "$FAILED" ] || [ "$(cd "$(dirname "$FAILED")" && pwd)" = "$OUT" ] || cp "$(dirname "$FAILED")"/gpu-*.json "$OUT" 2>/dev/null
[ -z "$FAILED" ] || { cp "$FAILED" "$SITE.tsv" && FAILED=$SITE.tsv; }
printf 'step\tstatus\tseconds\testimated\tnote\n' >"$OUT/steps.tsv"
: >"$OUT/log.txt"
began=$SECONDS worst=0
while read -r name estimate limit needs command; do
    if ! wanted "$name"; then
        if [ -n "$FAILED" ]; then note "$name" "$(earlier "$name")" - "$estimate" "in the earlier run"; fi
        continue
    fi
    left=$((LIMIT - (SECONDS - began)))
    if [ "$needs" != - ] && [ "${status[$needs]:-passed}" = absent ]; then
        note "$name" absent 0 "$estimate" "$needs is absent"; continue
    elif [ "$needs" != - ] && [ "${status[$needs]:-passed}" != passed ]; then
        note "$name" skipped 0 "$estimate" "$needs did not pass"; worst=1; continue
    elif [ "$left" -lt 5 ] && [ -z "$DRY" ]; then
        note "$name" skipped 0 "$estimate" "out of time"; worst=1; continue
    fi
    [ -n "$DRY" ] && limit=600
    [ "$left" -lt "$limit" ] && [ -z "$DRY" ] && limit=$left
    start=$SECONDS
    SECONDS_HERE=$limit timeout -k 5 "$limit" bash -c "$command" >"$OUT/step.log" 2>&1 </dev/null
    code=$?
    { echo "=== $name: $command"; tail -c 400000 "$OUT/step.log"; } >>"$OUT/log.txt"
    case $code in
        0) note "$name" passed $((SECONDS - start)) "$estimate" "" ;;
        77) note "$name" absent $((SECONDS - start)) "$estimate" "no such tool here" ;;
        124 | 137) note "$name" timeout $((SECONDS - start)) "$estimate" "over $limit s"; worst=1 ;;
        *) note "$name" failed $((SECONDS - start)) "$estimate" "$(tail -n 1 "$OUT/step.log" | tr -d '\t' | cut -c 1-200)"; worst=1 ;;
    esac
    rm -f "$OUT/step.log"
done < <(plan)
$PYTHON benchmarks/record.py "$OUT"
echo "$((SECONDS - began)) s; results in $OUT"
exit $worst
