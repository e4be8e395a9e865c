#!/usr/bin/env bash
# Makes an environment with other versions of Python, torch and the frameworks, installs distclip's
# wheel in it, runs a part of the tests, and writes docs/versions.md; row by row:
# bash launch/try_versions.sh [--help] [--list] [--part quick|all] [ROW ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" launch/try_versions.py "$@"
