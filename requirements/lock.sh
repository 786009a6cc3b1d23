#!/usr/bin/env bash
# Resolve pyproject.toml and its dev extra into exact versions, for every platform and Python from 3.11 on: lock.sh UV
#
# torch is named by version only: its builds for processors and CUDA versions differ in what they bring along, so what a
# build itself requires (nvidia-*, cuda-*) is left to it. The lock for GPUs adds triton, which compiles our kernels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
uv=$1 torch=${TORCH:-2.13.0}
resolved=$(mktemp)
trap 'rm -f "$resolved"' EXIT
"$uv" pip compile ../pyproject.toml --extra dev --universal --python-version 3.11 --upgrade --quiet \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
    --constraint <(echo "torch==$torch") --output-file "$resolved"
grep -qE "^torch==$torch" "$resolved" || { echo "error: $torch is not what was resolved for torch" >&2; exit 1; }
write() { # write FILE SED-PROGRAM
    { echo "# Written by 'make lock'; do not edit."; sed -E "$2" "$resolved"; } > "$1.part"
    mv "$1.part" "$1"
}
write cuda.txt "/^(nvidia-|cuda-)/d; s/^triton==([^ ]+).*/triton==\1 ; sys_platform == 'linux'/"
write cpu.txt '/^(nvidia-|cuda-|triton==)/d'
wc -l cpu.txt cuda.txt
