"""Train a run, or go on with it: python train.py --config=configs/radial_nano.py [--workdir=DIR] [--config.a.b=…]"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from radialnet import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run folder, runs/<name of the config> by default; the same command goes on with it."
)


def main() -> None:
    config = cli.read_config(_CONFIG)
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    # Here, so that a mistake in the config is reported at once and not after seconds of imports.
    from radialnet.trainer import train

    train(config, Path(_WORKDIR.value or Path("runs", name)))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
