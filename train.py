"""Train a run, or go on with it: python train.py --config=configs/radial_nano.py [--workdir=DIR] [--config.a.b=…]

On all devices there are, and with all processes of a TPU pod, GKE, Slurm or MPI job; each of them runs this command.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from radialnet import cli
from radialnet.checks import expanded

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run folder, runs/<name of the config> by default; the same command goes on with it."
)
_DISTRIBUTED = flags.DEFINE_enum("distributed", "auto", ["auto", "on", "off"], "Whether to look for other processes.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0, where no job tells.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are, where no job tells.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, where no job tells.")


def main() -> None:
    config = cli.read_config(_CONFIG)
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    # Here, so that a mistake in the config is reported at once and not after seconds of imports.
    from radialnet.processes import join_processes
    from radialnet.trainer import train

    join_processes(_DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    train(config, expanded(_WORKDIR.value) if _WORKDIR.value else Path("runs", name))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
