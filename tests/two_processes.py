"""One of two processes that train something together: python two_processes.py PROCESS PORT WORKDIR NUM_STEPS [SLEEP_AT]

Not a model, which takes long to compile: an array over both processes, what saves it, and what ends it.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from radialnet import watchdog
from radialnet.checkpoint import Checkpoints
from radialnet.cli import EXIT_PREEMPTED
from radialnet.preemption import Preemption
from radialnet.sharding import along, replicated


def initial(split):
    w = jax.device_put(jnp.arange(24.0).reshape(8, 3), split)
    return {"state": {"w": w, "norm": jax.device_put(jnp.float32(0), replicated(split))}}


@jax.jit
def train_step(trees, step):
    """Every element depends on all others, those of the other process too."""
    w = trees["state"]["w"]
    w = jnp.cos(w * 1.1 + w.sum() / 7 + step)
    return {"state": {"w": w, "norm": jnp.sqrt((w**2).sum())}}


def main(process, port, workdir, num_steps, sleep_at=-1):
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    assert jax.process_count() == 2 and jax.device_count() == 2
    watchdog.LEAST_SECONDS = 1.5
    split = along("data", jax.devices())
    with Checkpoints(Path(workdir), keep=2) as checkpoints, Preemption() as preemption:
        step = checkpoints.newest(report=print) or 0
        trees = initial(split)
        if step:
            trees = checkpoints.restore(step, trees)
        print("from", step, flush=True)
        with watchdog.Watchdog(3.0) as watched:
            while step < num_steps:
                if step == sleep_at and process == 1:
                    time.sleep(5)
                step += 1
                watched.begins(step)
                trees = train_step(trees, step)
                asked = preemption.asked()
                jax.block_until_ready(trees)
                time.sleep(0.05)
                if asked or step % 10 == 0:
                    checkpoints.save(step, trees)
                if asked:
                    checkpoints.check(wait=True)
                    print("saved", step, asked.name, flush=True)
                    sys.exit(EXIT_PREEMPTED)
    print("done", step, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), sys.argv[3], *map(int, sys.argv[4:]))
