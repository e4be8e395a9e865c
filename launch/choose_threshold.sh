#!/usr/bin/env bash
# Measures gradient norms without clipping, suggests a threshold, and tries it beside one too small
# and one too large; ends with a table and a picture: bash launch/choose_threshold.sh [--help]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python launch/choose_threshold.py "$@"
