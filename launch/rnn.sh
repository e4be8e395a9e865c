#!/usr/bin/env bash
# Trains a recurrent network whose gradients explode on 2 ranks, with and without clipping, and ends
# with a table and a picture: bash launch/rnn.sh [--help]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python launch/rnn.py "$@"
