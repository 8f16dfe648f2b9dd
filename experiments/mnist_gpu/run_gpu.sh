#!/usr/bin/env bash
# Four runs at a time: the network is too small to fill a GPU by itself. Its times say little.
#   bash experiments/mnist_gpu/run_gpu.sh [--cpu]
exec bash "$(dirname "$0")/../gpu.sh" mnist_gpu mnist 4 "$@"
