#!/usr/bin/env bash
# Train on slices of TPUs in a GKE cluster, by xpk:
#
#     launch/gke.sh CLUSTER v5litepod-256 2 IMAGE --config=configs/radial_base.py --workdir=/mnt/shared/radial_base
#
# The cluster is there (xpk cluster create) with the shared folder mounted, IMAGE was made by launch/Dockerfile with
# JAX=tpu. The slices find each other by themselves. A workload whose run was asked to end (75) is started again, and has
# five minutes to save before that.
set -euo pipefail
cluster=$1 tpu_type=$2 num_slices=$3 image=$4
shift 4

xpk workload create \
    --cluster="$cluster" \
    --workload="radialnet-$(date +%m%d-%H%M%S)" \
    --tpu-type="$tpu_type" \
    --num-slices="$num_slices" \
    --docker-image="$image" \
    --max-restarts=100 \
    --restart-on-exit-codes=75 \
    --termination-grace-period-seconds=300 \
    --command="python train.py $(printf '%q ' "$@")"
