#!/usr/bin/env bash
# Figures of "never worse than the start" and of coreq's spread over seeds, on a GPU, the most important first.
#
#   benchmarks/learning_safety_gpu.sh MODEL TEXTS RESULTS [STAGE ...]
#
# MODEL and TEXTS as for learning_gpu.sh. RESULTS receives a folder per stage with a record per run, written as soon as
# the run is scored, and its table.md. Interrupted and started again, it goes on; finished runs are not repeated.
# STAGE  spread (coreq at 128 x 2048 tokens, three seeds), little-8, -32, -128, -16, -64 (sequences of 512 tokens),
#        best (3.25 bits, 32 x 512 tokens), ablation (windows and curriculum, 32 x 1024 tokens); all by default.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,10p' "$0" | cut -c3-; exit 2; }
model=$1 texts=$2 results=$3 python=${PYTHON:-python}
shift 3
[ $# -gt 0 ] || set -- spread little-8 little-32 little-128 best little-16 little-64 ablation
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

run() {  # FOLDER OPTIONS...
    local folder=$1; shift
    "$python" benchmarks/quality/learning.py "$model" --calib "$texts/c4.txt@0:0.8" --device "${DEVICE:-cuda}" --in-process \
        --text "wikitext2=$texts/wikitext2-raw-test.txt" --text "c4=$texts/c4.txt@0.8:1" --max-tokens 131072 \
        --results "$results/$folder" "$@" > "$results/$folder.md" || echo "stage $folder: some runs failed" >&2
}

mkdir -p "$results"
for stage in "$@"; do
    case $stage in
    spread)
        run spread --seeds 1,0,2 --cells 'coreq W2 g64/default,coreq W2 g64/bounded*,coreq W2 g64/hessian scales'
        run spread --seeds 0 --cells 'coreq W3 g64/default,coreq W3 g64/bounded*,coreq W4 g64/default,coreq W4 g64/bounded*'
        run spread --seeds 1 --cells 'coreq W2 g64/*' ;;
    little-*)
        run "$stage" --seeds 0 --samples "${stage#little-}" --seqlen 512 \
            --cells 'little W2 g64/coreq,little W2 g64/sliderquant,little W2 g64/sliderquant (*,little W3 g64/coreq,little W3 g64/sliderquant,little W3 g64/sliderquant (*' ;;
    best)
        run best --seeds 0 --samples 32 --seqlen 512 --cells 'best W3 g64 sym rotated/*,best W3 g64 sym/*' ;;
    ablation)
        run ablation --seeds 0,1 --samples 32 --seqlen 1024 --cells 'ablation W2 g64/*' ;;
    *) echo "unknown stage $stage" >&2; exit 2 ;;
    esac
done
