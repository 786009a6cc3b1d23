#!/usr/bin/env bash
# Every figure of docs/results that needs a GPU, in one run: GPU tests, seconds of coreq, the quality tables.
#
#   benchmarks/gpu_figures.sh MODEL TEXTS RESULTS
#
# MODEL    a folder with SmolLM2-135M-Instruct in bfloat16 (or any other model)
# TEXTS    a folder with c4.txt (calibration: first 80 %, held out: the rest) and wikitext2-raw-test.txt
# RESULTS  receives records/*.json, table.md, variants.md, seconds.json, 8b.jsonl, tests.txt, machine.txt
#
# It may be interrupted and started again: finished runs are not repeated. PYTHON names the interpreter.
set -euo pipefail
[ $# -eq 3 ] || { sed -n '2,11p' "$0" | cut -c3-; exit 2; }
model=$1 texts=$2 results=$3 python=${PYTHON:-python}
cd "$(dirname "$0")/.."
mkdir -p "$results"
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device is visible"'
{ nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv; "$python" -m pip freeze; } > "$results/machine.txt"
common=("$model" --calib "$texts/c4.txt@0:0.8" --wiki "$texts/wikitext2-raw-test.txt" --held-out "$texts/c4.txt@0.8:1"
        --device cuda --records "$results/records")

"$python" -m pytest -q -rs tests/ptq/pipeline/test_cuda.py tests/ptq/runtime/test_linear.py tests/ptq/packing/test_bits.py \
    tests/ptq/integration/test_integration.py tests/ptq/integration/test_without_ptq.py 2>&1 | tee "$results/tests.txt"

# Seconds: a warm-up in the same process, then with and without the scale search.
"$python" benchmarks/speed/seconds.py "$model" --calib "$texts/c4.txt@0:0.8" --device cuda > "$results/seconds.json"

# 8B shapes, four random blocks: seconds a block, activations on the GPU and in memory, forecast over fact.
large=$(mktemp -d) && trap 'rm -rf "$large"' EXIT
"$python" benchmarks/speed/large_model.py make "$large/model" --shapes 8b --layers 4 --filled 4
for place in none memory; do
    for extra in --forecast ""; do
        "$python" benchmarks/speed/large_model.py coreq "$large/model" "$large/out" --samples 128 --seqlen 2048 \
            --offload "$place" $extra >> "$results/8b.jsonl"
    done
done

# The table of the main job: six methods, four schemes, three seeds, 128 x 2048 tokens, whole test text.
"$python" benchmarks/quality/quality.py "${common[@]}"
"$python" benchmarks/quality/quality.py --table "$results/records" > "$results/table.md"

# Symmetric grids, and every variant of coreq at W3 g64.
"$python" benchmarks/quality/quality.py "${common[@]}" --schemes "W4 g64 sym" "W3 g64 sym" "W3 channel sym" \
    --methods rtn gptq coreq
"$python" benchmarks/quality/quality.py "${common[@]}" --schemes "W3 g64 asym" --methods "coreq cd 2" "coreq row" "coreq js" \
    "coreq cv" "coreq .25" "coreq .5" "coreq 1" "coreq min-max" "coreq hessian scales" "coreq min-pivot"
"$python" benchmarks/quality/quality.py --table "$results/records" > "$results/variants.md"
