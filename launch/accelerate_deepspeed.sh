#!/usr/bin/env bash
# Trains a small transformer with ZeRO-3 under `accelerate launch`; what clips is the "distclip"
# section of the JSON. On CPU as it is: bash launch/accelerate_deepspeed.sh [options of train_lm.py]
#   JSON=configs/deepspeed/zero2.json   another stage or offload
#   RANKS=4                             another number of ranks
#   YAML=configs/accelerate/deepspeed.yaml   on GPUs
# `use_cpu: true` in the YAML also switches off DeepSpeed's shared-memory op, which every rank would
# compile in the first collective: that takes g++, ninja and 40 seconds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v distclip >/dev/null || source launch/setup.sh
# As `accelerate launch`; the module keeps the store of the ranks from listening on the network.
exec python -m distclip.testing.ranks.loopback accelerate.commands.launch --config_file "${YAML:-configs/accelerate/deepspeed_cpu.yaml}" \
    --num_processes "${RANKS:-2}" --deepspeed_config_file "${JSON:-configs/deepspeed/zero3.json}" \
    -m distclip run launch/train_lm.py --optimizer adamw --lr 3e-3 "$@"
