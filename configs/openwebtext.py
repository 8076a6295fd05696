"""OpenWebText, 8 million pages that GPT-2's makers might have read, for configs/radial_small.py.

Cost: 24 GB from the hub of Hugging Face, and 18 GB of tokens in data.cache_dir.
Expected: not measured.
Command: python -m radialnet.prepare --config=configs/openwebtext.py, then
python train.py --config=configs/openwebtext.py --workdir=runs/openwebtext
"""

from ml_collections import ConfigDict

from configs import radial_small


def get_config() -> ConfigDict:
    config = radial_small.get_config()
    config.data.source = "hf"
    config.data.path = "Skylion007/openwebtext"
    config.data.eval_fraction = 0.0005
    return config
