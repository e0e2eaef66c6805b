#!/usr/bin/env bash
# All GPU measurements of the repository in one call; what it does and its options: bench/gpu.py
# Takes the environment of the checkout if there is one, else the python on the path; needs no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=$(command -v python3)
export HF_HUB_OFFLINE=1 MPLBACKEND=agg TQDM_DISABLE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" bench/gpu.py "$@"
