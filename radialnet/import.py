"""Make a run folder from what `radialnet.export` wrote, or from a Llama: a folder of safetensors, or a GGUF file.

    python -m radialnet.import --from=DIR2|FILE.gguf --workdir=DIR [--json]

Evaluation and generation take the folder as any run's. Training goes on in it where it was a run (docs/INTERCHANGE.md).
"""

import json

from absl import flags

from radialnet import cli
from radialnet.checks import expanded
from radialnet.interchange import import_run


def main() -> None:
    found = {"workdir": _WORKDIR.value, **import_run(expanded(_FROM.value), expanded(_WORKDIR.value))}
    if _JSON.value:
        print(json.dumps(found))
    else:
        print("{workdir}: {format}, step {step}, {parameters:,} parameters in {tensors} tensors".format(**found))


if __name__ == "__main__":
    _FROM = flags.DEFINE_string("from", None, "Folder of safetensors, or .gguf file.", required=True)
    _WORKDIR = flags.DEFINE_string("workdir", None, "The run folder to make; it must not be there yet.", required=True)
    _JSON = flags.DEFINE_bool("json", False, "Print a JSON line alone.")
    cli.run(main)
