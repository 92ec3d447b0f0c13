#!/usr/bin/env bash
# All that remains to be seen on a GPU, in one command for a machine with one, and in at most ten minutes: that the mask
# selects what a full sort selects, that the recipes keep their promises there and fit where `gmt-tune memory` says, and
# what selection and training cost. With more minutes, the comparison of methods on the device.
#
#   benchmarks/gpu.sh                          needs gmt-tune with its test extra, and PyTorch for CUDA
#   benchmarks/gpu.sh --minutes 60 --out DIR   results go to DIR: gpu.jsonl, a line a part; traces; DIR/quality
#   benchmarks/gpu.sh --show DIR/gpu.jsonl     prints them as tables
#   benchmarks/gpu.sh --part sharded           one part alone
#   benchmarks/gpu.sh --rehearse               the same with small sizes on the CPU
exec python3 -u "$(dirname "$0")/gpu_check.py" "$@"
