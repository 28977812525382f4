#!/usr/bin/env bash
# Puts nvcc 13.0 and what it needs into a folder (target/cuda by default), from Python wheels: nothing of the system
# changes. Needs python3 with pip. build.rs finds the default folder by itself; another one through CUDA_PATH, which
# the last line prints.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-target/cuda}
root=$folder/nvidia/cu13
if ! "$root/bin/nvcc" --version >/dev/null 2>&1; then
  python3 -m pip --version >/dev/null 2>&1 || { echo "$0: needs pip: python3 -m pip does not run" >&2; exit 1; }
  rm -rf "$folder"
  python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --target "$folder" \
    'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' \
    'nvidia-cuda-cccl==13.0.*'
fi
# nvcc and others look for lib64, CMake for libcudart.so.
[ -e "$root/lib64" ] || ln -s lib "$root/lib64"
[ -e "$root/lib/libcudart.so" ] || ln -s libcudart.so.13 "$root/lib/libcudart.so"
"$root/bin/nvcc" --version | tail -n 2 >&2
echo "CUDA_PATH=$(cd "$root" && pwd)"
