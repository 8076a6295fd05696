"""Write a trained run as files that others read: safetensors, config.json, tokenizer.json.

    python -m radialnet.export --workdir=DIR --out=DIR2 [--format=radialnet|llama] [--json]

`llama`: of a plain transformer (docs/INTERCHANGE.md), as `transformers` loads it. `radialnet.import` reads both.
"""

import json

from absl import flags

from radialnet import cli
from radialnet.checks import expanded
from radialnet.interchange import FORMATS, export_run


def main() -> None:
    found = {
        "out": _OUT.value,
        "format": _FORMAT.value,
        **export_run(expanded(_WORKDIR.value), expanded(_OUT.value), _FORMAT.value),
    }
    if _JSON.value:
        print(json.dumps(found))
    else:
        print("{out}: {format}, step {step}, {parameters:,} parameters in {tensors} tensors".format(**found))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.", required=True)
    _OUT = flags.DEFINE_string("out", None, "The folder to write; it must not be there yet.", required=True)
    _FORMAT = flags.DEFINE_enum("format", "radialnet", FORMATS, "radialnet: all of it; llama: of a plain transformer.")
    _JSON = flags.DEFINE_bool("json", False, "Print a JSON line alone.")
    cli.run(main)
