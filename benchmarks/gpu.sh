#!/usr/bin/env bash
# Builds objslot, runs the tests that need a GPU, then the benchmarks, on a machine with an NVIDIA GPU and no network.
#
#     bash benchmarks/gpu.sh [FOLDER]
#
# Needs a Python with torch, setuptools, pybind11, cmake and ninja; nvcc for the CUDA kernels. Takes at most nine
# minutes. FOLDER (default: $OUT, else benchmarks-gpu) gets build.log, tests.log, gpu.jsonl (peers that are not
# compiled), compiled.jsonl (all of them, as far as the time goes) and their logs, each written as it goes.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-${OUT:-benchmarks-gpu}}")
python=${PYTHON:-python3}
limit=${SECONDS_IN_ALL:-530}
mkdir -p "$out"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
left() { echo $((limit - SECONDS)); }

device=cuda
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  device=cpu
  echo "no GPU: the tests marked for it are skipped, the benchmarks are the quick ones of the CPU"
}
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv

echo "== build ($(left) s left)"
timeout 240 "$python" -m pip install --no-build-isolation --no-deps --no-index --target "$site" -v . >"$out/build.log" 2>&1 || {
  tail -n 30 "$out/build.log"
  exit 1
}
# The benchmarks run from the checkout, whose package then has the compiled modules too.
cp "$site"/objslot/*.so objslot/ 2>/dev/null || echo "no compiled module: see $out/build.log"

echo "== tests ($(left) s left)"
# Those files alone: others may need packages that this machine lacks.
mapfile -t files < <(grep -rlE 'mark\.gpu' --include='test_*.py' tests)
if [ ${#files[@]} = 0 ]; then
  echo "no test is marked for a GPU" | tee "$out/tests.log"
  tests=0
else
  PYTHONPATH=$site timeout 170 "$python" -m pytest -m gpu -q "${files[@]}" >"$out/tests.log" 2>&1
  tests=$?
fi
tail -n 15 "$out/tests.log"

bench() { # NAME WORDS...: what its part of the suite prints goes to the log, its rows to the JSON lines
  local name=$1
  shift
  timeout "$(left)" "$python" -m benchmarks --device "$device" --out "$out/$name.jsonl" "$@" >"$out/$name.log" 2>&1
  local code=$?
  # 3: the time was over before all jobs were done
  [ "$code" = 0 ] || [ "$code" = 3 ] || tail -n 20 "$out/$name.log"
}

echo "== benchmarks ($(left) s left)"
if [ "$device" = cuda ]; then
  bench gpu --peers eager,POT,GeomLoss,flash-sinkhorn,scaled_dot,package,scipy,authors --within $((($(left) - 20) / 2))
  bench compiled --peers compiled --within $(($(left) - 40))
else
  bench quick sinkhorn slot_attention --peers eager --threads 1 --budget 0.1 --within $(($(left) - 20))
fi

echo "== results in $out, tests exited with $tests ($SECONDS s)"
"$python" -m benchmarks.short "$out"/*.jsonl
exit "$tests"
