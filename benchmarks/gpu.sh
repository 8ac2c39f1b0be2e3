#!/usr/bin/env bash
# Training speed of all five sizes on one GPU, against the Hugging Face Trainer, in under 8 minutes.
#   benchmarks/gpu.sh docs/results/gpu.json
# Needs torch (a CUDA build), numpy, tokenizers, safetensors; transformers and accelerate for the rival.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" benchmarks/gpu.py --json "${1:-gpu.json}" "${@:2}"
