#!/usr/bin/env bash
# Trains a DQN on CartPole on 2 ranks, with and without clipping, until it solves the game, and ends
# with a table and a picture: bash launch/dqn.sh [--help]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python launch/dqn.py "$@"
