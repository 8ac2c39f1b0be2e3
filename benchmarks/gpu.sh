#!/usr/bin/env bash
# What only a GPU can tell, on one of them, in under 8 minutes: whether it computes the same, how fast
# attention is by each way, and the training speed of all five sizes against the Hugging Face Trainer.
#   benchmarks/gpu.sh docs/results/gpu.json
# Needs torch (a CUDA build), numpy, safetensors; transformers and accelerate for the rival. No network.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" benchmarks/gpu.py --json "${1:-gpu.json}" "${@:2}"
