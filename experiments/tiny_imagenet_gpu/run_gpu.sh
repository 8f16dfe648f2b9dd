#!/usr/bin/env bash
# One run at a time, so that times can be compared. Ten shards are trained on: as JPEG (prepare.py folder --format jpg) with
# the judge 50 MB, which fit what such machines take (64 MiB) beside a checkout without the records of the studies:
#   git sparse-checkout set --no-cone '/*' '!/experiments/*/runs/' '!/experiments/*/comparison/'
#   mkdir -p gpu && tar -czhf gpu/tiny_imagenet.tar.gz data/tiny_imagenet/{classes.txt,judge.safetensors,train-00000[0-9].tar}
# The first call makes the reference of these ten shards. What is unfinished has 510 MB, more than such
# machines give back: it goes on in later calls on the same one. LARGEST=600 brings it back all the same, in 34 parts.
#   bash experiments/tiny_imagenet_gpu/run_gpu.sh [--cpu]
here=experiments/tiny_imagenet_gpu
export REFERENCE=reference_ten_shards.npz REFERENCE_OF="-c configs/tiny_imagenet_w2s.yaml -c $here/s2.yaml"
if [ "${1:-}" = --cpu ]; then # of one shard
    REFERENCE=reference_cpu.npz REFERENCE_OF="$REFERENCE_OF -c experiments/cpu.yaml -c $here/cpu.yaml"
fi
exec bash "$(dirname "$0")/../gpu.sh" tiny_imagenet_gpu tiny_imagenet 1 "$@"
