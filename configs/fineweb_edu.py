"""FineWeb-Edu (arXiv 2406.17557), its sample of 10 billion tokens, for configs/radial_small.py.

Cost: 28 GB from the hub of Hugging Face, and 20 GB of tokens in data.cache_dir.
Expected: not measured.
Command: python -m radialnet.prepare --config=configs/fineweb_edu.py, then
python train.py --config=configs/fineweb_edu.py --workdir=runs/fineweb_edu
"""

from ml_collections import ConfigDict

from configs import radial_small


def get_config() -> ConfigDict:
    config = radial_small.get_config()
    config.data.source = "hf"
    config.data.path = "HuggingFaceFW/fineweb-edu"
    config.data.subset = "sample-10BT"
    config.data.eval_fraction = 0.001
    return config
