#!/usr/bin/env bash
# Every figure of the learned methods that needs a GPU, in one run; docs/results/2026-11-23-sliderquant.md says which.
#
#   benchmarks/learning_gpu.sh MODEL TEXTS RESULTS
#
# MODEL    a folder with SmolLM2-135M-Instruct in bfloat16 (or any other model)
# TEXTS    a folder with c4.txt (calibration: first 80 %, held out: the rest) and wikitext2-raw-test.txt
# RESULTS  receives records/*.json, table.md, ablation/*.json, ablation.md, 8b.jsonl, memory.jsonl, autoround/, tests.txt, machine.txt
#
# The most important runs come first; it may be interrupted and started again, finished runs are not repeated. One run of
# sliderquant takes some 45 s on an H100, and scoring it as long again. PYTHON names the interpreter; AUTOROUND_PYTHON one
# that has Intel's auto-round, whose part is left out without it.
set -euo pipefail
[ $# -eq 3 ] || { sed -n '2,12p' "$0" | cut -c3-; exit 2; }
model=$1 texts=$2 results=$3 python=${PYTHON:-python}
cd "$(dirname "$0")/.."
mkdir -p "$results"
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device is visible"'
{ nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv; "$python" -m pip freeze; } > "$results/machine.txt"
common=("$model" --calib "$texts/c4.txt@0:0.8" --text "wikitext2=$texts/wikitext2-raw-test.txt" --text "c4=$texts/c4.txt@0.8:1"
        --device cuda)

"$python" -m pytest -q -rs tests/ptq/pipeline/test_cuda.py tests/ptq/learning/test_cuda_learning.py 2>&1 | tee "$results/tests.txt"

# Weight-only at 2 and 3 bits, and W4A4, three seeds, 128 x 2048 tokens.
"$python" benchmarks/quality/learning.py "${common[@]}" --results "$results/records" \
    --cells 'W2 g64/gptq,W2 g64/coreq,W2 g64/sliderquant,W3 channel/gptq,W3 channel/coreq,W3 channel/sliderquant'
"$python" benchmarks/quality/learning.py "${common[@]}" --results "$results/records" \
    --cells 'W4A4/rtn,W4A4/sliderquant,W4A4/sliderquant?*fixed*,W4A4 rotated/rtn,W4A4 rotated/sliderquant'

# 8B shapes: one window of four blocks, seconds a step and peak memory.
large=$(mktemp -d) && trap 'rm -rf "$large"' EXIT
"$python" benchmarks/speed/large_model.py make "$large/model" --shapes 8b --layers 4 --filled 4
"$python" benchmarks/speed/large_model.py sliderquant "$large/model" "$large/out" --samples 16 --seqlen 2048 > "$results/8b.jsonl"

# Peak memory beside what the largest window has to hold, with the streams on the GPU and in memory.
for offload in none memory; do
    "$python" benchmarks/speed/learning_memory.py "$model" --calib "$texts/c4.txt@0:0.8" --offload $offload >> "$results/memory.jsonl"
done

# What each part of the windows is worth: 32 x 1024 tokens.
"$python" benchmarks/quality/learning.py "${common[@]}" --results "$results/ablation" --samples 32 --seqlen 1024 \
    --max-tokens 65536 --cells 'ablation W2 g64/*,ablation W4A4/*'
"$python" benchmarks/quality/learning.py --results "$results/ablation" --table > "$results/ablation.md"

# Intel's auto-round on the same tokens, and the relatives on this engine.
if [ -n "${AUTOROUND_PYTHON:-}" ]; then
    mkdir -p "$results/autoround"
    "$python" benchmarks/export_tokens.py "$model" "$results/autoround/tokens.safetensors" --calib "$texts/c4.txt@0:0.8"
    "$AUTOROUND_PYTHON" benchmarks/peers/autoround_reference.py "$model" "$results/autoround/tokens.safetensors" \
        "$large/intel" --bits 3 --group-size 64 --asym --iters 200 --batch 8 --device cuda
    "$python" benchmarks/quality/learning.py "${common[@]}" --results "$results/records" --evaluate "intel=$large/intel" \
        --cells 'autoround/W3 g64' --seeds 0
fi
"$python" benchmarks/quality/learning.py "${common[@]}" --results "$results/records" --seeds 0 --cells 'W2 g64/*,W3 channel/*'
"$python" benchmarks/quality/learning.py --results "$results/records" --table > "$results/table.md"
