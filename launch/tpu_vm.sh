#!/usr/bin/env bash
# Train on all workers of a TPU VM slice:
#
#     launch/tpu_vm.sh NAME ZONE --config=configs/radial_base.py --workdir=/mnt/shared/radial_base
#
# The slice is there (gcloud compute tpus tpu-vm create), and so is the folder, on every worker: a file system that all
# of them have mounted. Each worker gets what is committed here, installs what is needed, runs the same command, and finds
# the others by itself. A slice that was taken away and created again goes on where it was by the same command.
set -euo pipefail
name=$1 zone=$2
shift 2

on_all_workers() {
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

here=$(cd "$(dirname "$0")/.." && pwd)
if [ -n "$(git -C "$here" status --porcelain)" ]; then
    echo "warning: $here has changes that are not committed; they are left out" >&2
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git -C "$here" archive --format=tar.gz --output="$folder/radialnet.tar.gz" HEAD
gcloud compute tpus tpu-vm scp "$folder/radialnet.tar.gz" "$name:" --zone="$zone" --worker=all
# Their own Python may be too old.
on_all_workers "mkdir -p radialnet && tar xzf radialnet.tar.gz -C radialnet && cd radialnet &&
    pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv &&
    python3 -m uv pip install --quiet --python .venv/bin/python -r requirements-tpu.txt"
on_all_workers "cd radialnet && .venv/bin/python train.py $(printf '%q ' "$@")"
