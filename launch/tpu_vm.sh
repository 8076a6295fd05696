#!/usr/bin/env bash
# Train on all workers of a TPU VM slice:
#
#     launch/tpu_vm.sh NAME ZONE --config=configs/radial_base.py --workdir=/mnt/shared/radial_base
#
# The slice is there (gcloud compute tpus tpu-vm create), and so is the folder, on every worker: a bucket or an NFS that
# all of them have mounted. Each worker installs what is needed, runs the same command, and finds the others by itself.
# A slice that was taken away and created again goes on where it was by the same command.
set -euo pipefail
name=$1 zone=$2
shift 2

on_all_workers() {
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

here=$(cd "$(dirname "$0")/.." && pwd)
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$here" archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:radialnet.tar.gz" --zone="$zone" --worker=all
on_all_workers "mkdir -p radialnet && tar xzf radialnet.tar.gz -C radialnet && cd radialnet && python3 -m venv .venv &&
    .venv/bin/pip install --quiet -r requirements-tpu.txt"
# Quoted twice, for they go through the shells of all workers.
on_all_workers "cd radialnet && .venv/bin/python train.py $(printf '%q ' "$@")"
