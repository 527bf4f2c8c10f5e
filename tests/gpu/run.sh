#!/bin/bash
# SPDX-License-Identifier: MIT OR Apache-2.0
# The GPU tests: needs a GPU, python3 with torch and pytest, and a built libmlstm.so (MLSTM_LIBRARY,
# or the release build). With --sanitize also a short run under compute-sanitizer.
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONDONTWRITEBYTECODE=1
PYTHON=${PYTHON:-python3}
"$PYTHON" -m pytest -q -p no:cacheprovider -x --durations=5 .
"$PYTHON" accuracy.py
if [[ "${1:-}" == --sanitize ]]; then
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$PYTHON" sanitize.py
  done
fi
