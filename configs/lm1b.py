"""The One Billion Word benchmark (arXiv 1312.3005), 30 million sentences, for configs/radial_small.py; by TFDS.

Cost: `tfds build lm1b --file_format=array_record` in an environment with TensorFlow makes 5 GB, which is then read
without it; and 2 GB of tokens in data.cache_dir.
Expected: not measured.
Command: python -m radialnet.prepare --config=configs/lm1b.py, then
python train.py --config=configs/lm1b.py --workdir=runs/lm1b
"""

from ml_collections import ConfigDict

from configs import radial_small


def get_config() -> ConfigDict:
    config = radial_small.get_config()
    config.data.source = "tfds"
    config.data.path = "lm1b"
    config.data.eval_fraction = 0.001
    return config
