#!/usr/bin/env bash
# Builds and installs the package with pip into a throw-away venv and runs prove.py there.
#
#   run.sh [--record FILE] [PART …]     e.g. --record verify/results/torch.md; PART: what to run of prove.py
#
# The package gets the host executor, which runs CUDA kernels on the CPU. Q3N_CUDA=1 run.sh: and those kernels for GPUs,
# which needs nvcc; prove.py then runs them where there is a GPU.
# torch, transformers and safetensors come from the interpreter $PYTHON (python3) where it has them, else from PyPI.
set -euo pipefail
folder=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
[ "${1:-}" != --record ] || set -- --record "$(realpath "$2")" "${@:3}"
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT

"$python" -m venv "$venv"
site() { "$1" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }
if "$python" -c 'import torch, transformers, safetensors' 2>/dev/null; then
  site "$python" >"$(site "$venv/bin/python")/torch.pth"
else
  "$venv/bin/pip" install -q torch transformers safetensors
fi
# The build has a venv of its own, with cmake where the system has none.
Q3N_CUDA_HOST=1 "$venv/bin/pip" install -q --no-deps "$folder"
cd "$venv"
"$venv/bin/python" "$folder/prove.py" "$@"
