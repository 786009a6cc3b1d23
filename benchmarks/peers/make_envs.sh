#!/usr/bin/env bash
# Environments of the peers that compare.py runs, one each, because their pins exclude one another and ours.
#
#   benchmarks/peers/make_envs.sh DIR          # makes DIR/llmcompressor and DIR/gptqmodel; takes minutes
#
# torch goes in first and alone: resolving it later with an open range pulls gigabytes of CUDA libraries.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
PYTHON=${PYTHON:-python3.11}
TORCH=${TORCH:-torch==2.13.0}

make_env() { # name, then packages
    local env=$1
    shift
    [ -x "$env/bin/python" ] || "$PYTHON" -m venv "$env"
    local pip=("$env/bin/python" -m pip --disable-pip-version-check install --quiet --progress-bar off)
    "${pip[@]}" "$TORCH" wheel "setuptools<82" numpy
    "${pip[@]}" "$TORCH" "$@"
    "$env/bin/python" -m pip freeze >"$env/freeze.txt"
    echo "made $env"
}

mkdir -p "$1"
make_env "$1/llmcompressor" "llmcompressor==0.14.0.1"
make_env "$1/gptqmodel" "gptqmodel==7.6.0"
