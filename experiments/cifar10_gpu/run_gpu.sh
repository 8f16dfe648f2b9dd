#!/usr/bin/env bash
# One run at a time, so that times can be compared.
#   bash experiments/cifar10_gpu/run_gpu.sh [--cpu]
exec bash "$(dirname "$0")/../gpu.sh" cifar10_gpu cifar10 1 "$@"
