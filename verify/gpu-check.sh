#!/bin/bash
# The CUDA kernels on a GPU: verified, watched by compute-sanitizer, timed. The machine with the GPU needs no Rust, only
# this source tree and what --build made.
#
#   verify/gpu-check.sh --build                  where cargo and nvcc are: the command, in target/gpu-check
#   verify/gpu-check.sh --run OUT.md [PART]...   where the GPU is; parts: verify sanitize bench model (default all)
#
# Exit status 1: a check failed. What can't run is SKIPPED in OUT.md, which grows as the parts go on.
#
# Q3N_CUDA_ARCHS  --build: architectures, default 90a
# Q3N_QWEN3NEXT   --run: the command, default target/gpu-check/qwen3next
# Q3N_STEP_S      --run: seconds that a step may take, default 300
# Q3N_STRIDE      --run: every how many-th case compute-sanitizer watches, default 50
# Q3N_JOBS        --run: how many of those at a time, default half the cores
set -u
from=$PWD
cd "$(dirname "$0")/.." || exit 2
here=target/gpu-check

usage() {
  sed -n '5,6s/^# *//p' "$0" >&2
  exit 2
}

build() {
  set -e
  Q3N_CUDA_ARCHS=${Q3N_CUDA_ARCHS:-90a} cargo build --release -p qwen3next-verify --features cuda,cuda-host
  mkdir -p "$here"
  strip -o "$here/qwen3next" "${CARGO_TARGET_DIR:-target}/release/qwen3next"
  # What the other machine must have; the driver is opened when it is needed.
  ldd "$here/qwen3next"
  local bytes
  bytes=$(stat -c %s "$here/qwen3next")
  echo "$here/qwen3next: $bytes bytes"
  [ "$bytes" -lt 60000000 ] || { echo "more than 60 MB" >&2; exit 1; }
}

command=${Q3N_QWEN3NEXT:-$here/qwen3next}
step_s=${Q3N_STEP_S:-300}
stride=${Q3N_STRIDE:-50}
jobs=${Q3N_JOBS:-$((($(nproc) + 1) / 2))}
failed=0 skipped=0

say() { printf '%s\n' "$*" >>"$out"; }

# verdict NAME STATUS LOG: a line of a list. A command that skips its work says so, and exits with 0.
verdict() {
  if [ "$2" = 124 ] || [ "$2" = 137 ]; then
    say "- FAILED: $1: not done after $step_s s"
    failed=1
  elif [ "$2" != 0 ]; then
    say "- FAILED: $1: exit status $2"
    failed=1
  elif grep -q '^SKIPPED cuda' "$3"; then
    say "- $1: $(grep -m 1 '^SKIPPED cuda' "$3")"
    skipped=$((skipped + 1))
    return
  else
    say "- passed: $1"
    return
  fi
  say '```'
  tail -n 40 "$3" >>"$out"
  say '```'
}

# step NAME COMMAND...: runs it into $logs/NAME.
step() {
  local log=$logs/$1
  shift
  timeout -k 10 "$step_s" "$@" >"$log" 2>"$log.err" </dev/null
  local status=$?
  [ "$status" = 0 ] || cat "$log.err" >>"$log"
  echo "$status" >"$log.status"
}

shown() {
  say ''
  say '```'
  cat "$1" >>"$out"
  say '```'
}

machine() {
  say '# CUDA kernels on a GPU'
  say ''
  say "- commit: $(cat "$here/commit" 2>/dev/null || git rev-parse HEAD 2>/dev/null || echo unknown)"
  say "- date: $(date -u +%Y-%m-%d)"
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit \
      --format=csv,noheader 2>&1 | sed 's/^/- GPU: name, driver, memory, SM and memory clock, power limit: /' >>"$out"
    nvidia-smi 2>/dev/null | grep -o 'CUDA Version: [0-9.]*' | sed 's/^/- driver for /' >>"$out"
  else
    say '- GPU: SKIPPED: no nvidia-smi'
  fi
  say "- toolkit: $(nvcc --version 2>/dev/null | grep -o 'release [0-9.]*' || echo 'SKIPPED: no nvcc')"
  say "- compute-sanitizer: $("$sanitizer" --version 2>/dev/null | grep -o -i 'version.*' || echo 'SKIPPED: not found')"
  say "- CPU: $(grep -m 1 'model name' /proc/cpuinfo | sed 's/.*: //'), $(nproc) cores"
}

verify() {
  say ''
  say '## Verification'
  say ''
  step verify "$command" verify --backend cuda
  verdict 'verify --backend cuda' "$(cat "$logs/verify.status")" "$logs/verify"
  shown "$logs/verify"
}

sanitize() {
  say ''
  say "## compute-sanitizer, every ${stride}th case"
  say ''
  local tool op operators
  # All suites, as the refusal of another name lists them.
  operators=$("$command" verify --op '?' 2>&1 | sed -n 's/.*expected one of //p' | tr -d ,)
  if [ -z "$sanitizer" ] || ! "$sanitizer" --version >/dev/null 2>&1; then
    say '- SKIPPED: no compute-sanitizer'
    skipped=$((skipped + 1))
    return
  fi
  for op in $operators; do
    for tool in memcheck racecheck initcheck synccheck; do
      while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
      step "$tool-$op" "$sanitizer" --tool "$tool" --error-exitcode 9 \
        "$command" verify --backend cuda --quick --stride "$stride" --op "$op" &
    done
  done
  wait
  for op in $operators; do
    for tool in memcheck racecheck initcheck synccheck; do
      verdict "$tool, $op" "$(cat "$logs/$tool-$op.status")" "$logs/$tool-$op"
    done
  done
}

# bench_of OPERATOR FLAG...
bench_of() {
  local name step_s=$step_s
  # Peers may compile themselves first.
  case " $* " in *' --peers '*) step_s=$((3 * step_s)) ;; esac
  name=bench-$(echo "$*" | tr -c 'a-z0-9_\n' -)
  step "$name" "$command" bench op "$@" --backend cuda
  verdict "bench op $*" "$(cat "$logs/$name.status")" "$logs/$name"
  # What `verdict` has shown of a failure or a skipped step is all there is.
  grep -q '^|' "$logs/$name" && { say ''; cat "$logs/$name" >>"$out"; say ''; }
}

bench() {
  say ''
  say '## Operators'
  say ''
  bench_of gated_delta --tokens 1 --peers
  bench_of gated_delta --tokens 1 --warm --peers
  bench_of gated_delta --tokens 1 --batch 128 --peers
  bench_of gated_delta --tokens 1 --batch 512 --peers
  bench_of gated_delta --tokens 1 --dtype bf16
  bench_of gated_delta --tokens 2048,8192,32768 -r 20
  bench_of gated_delta --tokens 2048,8192,32768 --dtype bf16 -r 20 --peers
  bench_of gated_delta --tokens 8192 --batch 8 --dtype bf16 -r 20 --peers
  # A share of the heads, where segments are to pay.
  bench_of gated_delta --tokens 2048,8192,32768 --heads 8/16 --dtype bf16 -r 20
  bench_of gated_delta --tokens 2048,8192,32768 --heads 4/8 --dtype bf16 -r 20
  bench_of matmul --form q8 --tokens 1 --shape 8192x2048,2048x4096,151936x2048
  bench_of matmul --form f32 --tokens 1 --shape 8192x2048
  bench_of matmul --form q8 --tokens 8,64,512 --shape 8192x2048 -r 20
  bench_of matmul --dtype bf16,f16 --tokens 1,512 --shape 8192x2048 -r 20 --peers
  bench_of moe_route --tokens 1,512 --peers
  bench_of moe_group --tokens 1,512
  bench_of moe_up --form q8 --tokens 1,8,512 -r 20
  bench_of moe_down --form q8 --tokens 1,8,512 -r 20
  bench_of attention --tokens 1 --shape 8192 --dtype f16 --peers
  bench_of attention --tokens 1 --shape 8192 --dtype q8_0
  bench_of attention --tokens 512 --shape 8192 --dtype f16 -r 20 --peers
  bench_of attention_merge --tokens 1
  bench_of causal_conv --tokens 1,8192 --peers
  bench_of norm --tokens 1,8192 --peers
  bench_of rope --tokens 1,8192
  bench_of solve_tri --peers
  bench_of dequantize
}

# Only where `bench model` takes layers to a GPU: where it does not, its figures are the CPU's.
model() {
  say ''
  say '## Model: real layer shapes, 4 and 48 layers, q4_k, random weights'
  say ''
  step probe "$command" bench model -ngl -1 -p 8 -n 1 -r 1 -o json
  if ! grep -q '"backends": *"[^"]*CUDA' "$logs/probe"; then
    say '- SKIPPED: bench model has no layers on a GPU'
    skipped=$((skipped + 1))
    return
  fi
  step synth "$command" synth "$logs/slice.gguf" --layers 4 --quant q4_k
  verdict synth "$(cat "$logs/synth.status")" "$logs/synth"
  [ "$(cat "$logs/synth.status")" = 0 ] || return
  # The 48-layer model is these layers twelve times over, each with memory of its own; then its experts on the CPU.
  model_of "$logs/slice.gguf" -ngl -1 -p 512,2048,8192 -n 128
  model_of "$logs/slice.gguf" -ngl -1 --repeat-layers 48 -p 512,8192 -n 128 -r 2
  model_of "$logs/slice.gguf" -ngl -1 --repeat-layers 48 --n-cpu-moe 48 -p 512,8192 -n 64 -r 1
  rm -f "$logs/slice.gguf"
}

# model_of FILE FLAG...
model_of() {
  local file=$1
  shift
  step model "$command" bench model -m "$file" "$@"
  verdict "bench model $*" "$(cat "$logs/model.status")" "$logs/model"
  grep -q '^|' "$logs/model" && { say ''; cat "$logs/model" >>"$out"; say ''; }
}

run() {
  [ -x "$command" ] || { echo "$command: not there; --build makes it where Rust is" >&2; exit 2; }
  : >"$out" || exit 2
  logs=$(mktemp -d) || exit 2
  trap 'rm -rf "$logs"' EXIT
  sanitizer=$(command -v compute-sanitizer || echo "${CUDA_PATH:-/usr/local/cuda}/bin/compute-sanitizer")
  machine
  local part
  for part; do "$part"; done
  say ''
  if [ "$failed" = 0 ]; then say "No check failed, $skipped steps SKIPPED."; else say 'A check FAILED.'; fi
  return "$failed"
}

case ${1-} in
  --build)
    [ $# = 1 ] || usage
    build
    git rev-parse HEAD >"$here/commit" 2>/dev/null || rm -f "$here/commit"
    ;;
  --run)
    [ $# -ge 2 ] || usage
    case $2 in /*) out=$2 ;; *) out=$from/$2 ;; esac
    shift 2
    for part; do
      case $part in verify | sanitize | bench | model) ;; *) usage ;; esac
    done
    [ $# -gt 0 ] || set -- verify sanitize bench model
    run "$@"
    ;;
  *) usage ;;
esac
