#!/usr/bin/env bash
# Train on nodes with GPUs under Slurm, one process for each GPU:
#
#     sbatch --nodes=4 --time=24:00:00 launch/slurm.sh --config=configs/radial_small.py --workdir=/shared/radial_small
#
# From the root of the repository, with its .venv (and jax[cuda12] in it) on a file system that all nodes share. The
# processes find each other by themselves. Three minutes before the limit Slurm sends SIGTERM to all of them: the run
# saves, ends with exit code 75, and the job goes back into the queue, from where it goes on. The same after a node was
# lost (--requeue).
#SBATCH --job-name=radialnet
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@180
#SBATCH --open-mode=append
#SBATCH --output=radialnet-%j.log
set -uo pipefail

srun --kill-on-bad-exit=0 .venv/bin/python train.py --distributed=on "$@"
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
