"""The documents of a config tokenised ahead of training, by parallel processes.

    python -m radialnet.prepare --config=configs/fineweb_edu.py [--num_processes=8] [--json]

What is made lies in `data.cache_dir`, where training finds it. A command that was ended, however, goes on where it was
when it is run again. The last line of stdout is one JSON object: `sha256` of the documents, `num_documents` and
`num_tokens` of each split, `vocab_size`, `seconds`.
"""

import json
import os
import time

import rich.console
from absl import flags
from ml_collections import config_flags

from radialnet import cli
from radialnet.data import prepare
from radialnet.progress import counted
from radialnet.sections import ConfigError


def main() -> None:
    config, num_processes = cli.read_config(_CONFIG), _NUM_PROCESSES.value or len(os.sched_getaffinity(0))
    if config.data.streaming:
        raise ConfigError("config.data.streaming=True: what is read as it comes is not prepared")
    start, console = time.perf_counter(), rich.console.Console(stderr=True, highlight=False)
    with counted(console) as report:
        dataset = prepare(config, None, num_processes, report)
    found = {
        **{name: dataset.manifest[name] for name in ("source", "sha256", "num_documents", "num_tokens")},
        "vocab_size": dataset.tokenizer.vocab_size,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if not _JSON.value:
        for split in ("train", "eval"):
            documents, tokens = found["num_documents"][split], found["num_tokens"][split]
            print(f"{split}: {documents:,} documents, {tokens:,} tokens, {len(getattr(dataset, split)):,} rows")
    print(json.dumps(found))


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
    _NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many tokenise; one a core by default.", 1, 1024)
    _JSON = flags.DEFINE_bool("json", False, "Print the JSON line alone.")
    flags.mark_flag_as_required("config")
    cli.run(main)
