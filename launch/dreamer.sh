#!/usr/bin/env bash
# Trains a small world model with DreamerV3's optimizer chain under FSDP2 on 2 ranks, with and
# without its clipping, and ends with a table and a picture: bash launch/dreamer.sh [--help]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python launch/dreamer.py "$@"
