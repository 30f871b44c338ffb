#!/usr/bin/env bash
# The checks that need an NVIDIA GPU: the tests marked `cuda`, then the benchmarks. Run it on a machine that has one;
# results go to the folder named by OUT (default benchmarks/results).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
"$PYTHON" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "no CUDA device is visible")'
# what the package needs and the machine may lack; torch itself is never touched
"$PYTHON" -c 'import msgspec, tyro, rich, psutil, transformers, pytest' 2>/dev/null ||
  "$PYTHON" -m pip install -q --no-deps msgspec tyro rich psutil pytest pytest-timeout hypothesis docstring_parser typeguard
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
PYTHONPATH=. "$PYTHON" -m pytest tests -m cuda -q --timeout 300 -p no:cacheprovider 2>&1 | tee "$OUT/gpu_tests.txt"
model=$(mktemp -d)
PYTHONPATH=. "$PYTHON" scripts/make_bench_model.py llama-0.5b "$model"
PYTHONPATH=. "$PYTHON" -m lockstep bench throughput "$model" --device cuda --dtype bfloat16 --compare transformers --json |
  tee "$OUT/gpu_throughput.jsonl"
rm -rf "$model"
