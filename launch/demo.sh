#!/usr/bin/env bash
# Trains a small transformer on 4 gloo ranks with FSDP2, without clipping, with a global norm and
# with AGC, and ends with a table and a picture: bash launch/demo.sh [--help]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python launch/demo.py "$@"
