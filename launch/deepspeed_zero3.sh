#!/usr/bin/env bash
# Trains a small transformer with ZeRO-3 under the `deepspeed` launcher; what clips is the "distclip"
# section of the JSON. On CPU as it is: bash launch/deepspeed_zero3.sh [options of train_deepspeed.py]
#   JSON=configs/deepspeed/zero2.json   another stage, precision or offload
#   RANKS=4                             another number of ranks
#   CPU=                                on GPUs, one rank each
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v distclip >/dev/null || source launch/setup.sh
# --cpu also switches off DeepSpeed's shared-memory op, which every rank would compile in the first
# collective: that takes g++, ninja and 40 seconds, and saves nothing at this size.
exec deepspeed --num_gpus "${RANKS:-2}" --master_port "${PORT:-29500}" --module \
    distclip run ${CPU---cpu} launch/train_deepspeed.py \
    --deepspeed_config "${JSON:-configs/deepspeed/zero3.json}" "$@"
