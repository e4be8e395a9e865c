#!/usr/bin/env bash
# The whole test suite, on a machine with only python3 and pip: bash launch/test.sh [pytest args]
# Multi-rank tests run on gloo ranks on this machine; no GPU is needed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m pytest "$@"
