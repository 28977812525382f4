#!/usr/bin/env bash
# Builds and installs the package with pip into a throw-away venv and runs prove.py there.
#
#   run.sh [--record FILE]     e.g. --record verify/results/torch.md
#
# torch, transformers and safetensors come from the interpreter $PYTHON (python3) where it has them, else from PyPI.
set -euo pipefail
folder=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
record=()
[ "${1:-}" != --record ] || record=(--record "$(realpath "$2")")
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
"$venv/bin/pip" install -q --no-deps "$folder"
cd "$venv"
"$venv/bin/python" "$folder/prove.py" "${record[@]}"
