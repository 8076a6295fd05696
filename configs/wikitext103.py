"""WikiText-103 (arXiv 1609.07843), 100 million words of Wikipedia, for configs/radial_small.py. Its lines are the
documents.

Cost: 0.3 GB from the hub of Hugging Face, and 0.3 GB of tokens in data.cache_dir.
Expected: not measured.
Command: python -m radialnet.prepare --config=configs/wikitext103.py, then
python train.py --config=configs/wikitext103.py --workdir=runs/wikitext103
"""

from ml_collections import ConfigDict

from configs import radial_small


def get_config() -> ConfigDict:
    config = radial_small.get_config()
    config.data.source = "hf"
    config.data.path = "Salesforce/wikitext"
    config.data.subset = "wikitext-103-raw-v1"
    config.data.eval_fraction = 0.005
    return config
