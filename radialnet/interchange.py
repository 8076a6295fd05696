"""Trained models in files that others read: folders of safetensors, config.json and tokenizer.json.

    format      tensors                                     docs/INTERCHANGE.md lists them
    radialnet   every parameter and controller, as it is    bit for bit, there and back
    llama       of a plain transformer                      as `transformers` has them (`llama`)

A folder that is written appears whole or not at all.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy

from radialnet.checkpoint import Checkpoints
from radialnet.cli import warn
from radialnet.config import Config
from radialnet.controllers import Controllers
from radialnet.data import tokenizer_of_run
from radialnet.files import sha256_of, write_whole
from radialnet.gguf_file import read_gguf
from radialnet.llama import config_of_llama, from_llama, llama_fields, to_llama
from radialnet.model import abstract_params
from radialnet.opt import config_of_opt, from_opt
from radialnet.optimizer import make_optimizer
from radialnet.pretrained import Tensors, needed
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.tokenizer import Tokenizer
from radialnet.train_step import init_state, trees_of
from radialnet.trained import load_trained

FORMATS = ("radialnet", "llama")
# By the `model_type` of their config.json, what makes a config and parameters of what others trained.
PRETRAINED = {"llama": (config_of_llama, from_llama), "opt": (config_of_opt, from_opt)}
# Of a folder; where the tensors are split over several files, the index says which is where.
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What models of before safetensors have.
PICKLED = "pytorch_model.bin"


def export_run(workdir: Path, out: Path, kind: str) -> dict:
    """Write the newest whole checkpoint of a run into a new folder.

    Returns:
        What was written: `step`, `tensors`, `parameters`.

    Raises:
        ConfigError: the folder is there already, or `workdir` can't be restored, or is no Llama and is to be one.
    """
    run = RunFolder(workdir)
    with _new_folder(out, "--out") as folder:
        trained = load_trained(workdir)
        if kind == "llama":
            fields = llama_fields(trained.config, trained.tokenizer.vocab_size, trained.tokenizer.separator_id)
            _write_json(folder / "config.json", fields)
            trained.tokenizer.save(folder / "tokenizer.json")
            # Without it `transformers` would take the class of Llama's own tokenizer.
            _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
            tensors, metadata = to_llama(trained.params, trained.config.model), {"format": "pt"}
        else:
            _copy(run, folder)
            tensors = _flat({**trained.params, "controllers": trained.controllers})
            metadata = {"format": "radialnet", "step": str(trained.step)}
        tensors = {name: np.asarray(x, order="C") for name, x in tensors.items()}
        try:
            safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata)
        except safetensors.SafetensorError as error:
            raise ConfigError(f"{out}: can't be written ({error})") from None
        # The library writes what its owner alone may read.
        shutil.copymode(folder / "config.json", folder / WEIGHTS)
    return {"step": trained.step, "tensors": len(tensors), "parameters": sum(x.size for x in tensors.values())}


def import_run(source: Path, workdir: Path) -> dict:
    """Write a new run folder from what `export_run` wrote, or from a model of PRETRAINED: a folder, or a .gguf file.

    A run that comes back has all that training goes on with, the optimizer fresh. What others trained has no documents
    that it is known to be trained on: it can be evaluated, decoded and up-cycled.

    Returns:
        What was read: `format`, `step`, `tensors`, `parameters`.

    Raises:
        ConfigError: `workdir` is there already, or what is in `source` can't be read or represented.
    """
    if source.is_dir() and "model_type" not in _read_json(source / "config.json"):
        with _new_folder(workdir, "--workdir") as folder:
            return _import_radialnet(source, RunFolder(folder))
    return import_pretrained(source, workdir, "--from")


def import_pretrained(source: Path, workdir: Path, flag: str = "--model") -> dict:
    """`import_run` of a model of PRETRAINED alone. `flag`: the one that names it."""
    if not source.exists():
        raise ConfigError(f"{flag}={source}: no such file or folder")
    with _new_folder(workdir, "--workdir") as folder:
        if source.is_file():
            return _import_gguf(source, RunFolder(folder))
        return _import_pretrained(source, _read_json(source / "config.json"), RunFolder(folder))


def _import_radialnet(source: Path, run: RunFolder) -> dict:
    config = Config.load(source / "config.json")
    tensors, metadata = _read_weights(source)
    if metadata.get("format") != "radialnet":
        raise ConfigError(f"{source}: its tensors were not written by radialnet.export --format=radialnet")
    params = abstract_params(config, tokenizer_of_run(RunFolder(source)).vocab_size)[1]
    _copy(RunFolder(source), run.root)
    controllers = jax.eval_shape(lambda: Controllers.init(config.router, config.model.pool_size))
    trees = _unflat(tensors, {**params, "controllers": controllers}, str(source))
    controllers, step = trees.pop("controllers"), int(metadata["step"])
    state = init_state(config, trees, make_optimizer(config))
    # The learning rate goes on from the step; the moments are new.
    optimizer = jax.tree.map(
        lambda part: part._replace(count=jnp.int32(step)) if isinstance(part, optax.ScaleByScheduleState) else part,
        state.optimizer,
        is_leaf=lambda part: isinstance(part, optax.ScaleByScheduleState),
    )
    state = state.replace(step=jnp.int32(step), controllers=controllers, optimizer=optimizer)
    return _save(run, step, trees_of(state), "radialnet", tensors)


def _import_pretrained(source: Path, fields: dict, run: RunFolder) -> dict:
    if not isinstance(kind := fields.get("model_type"), str) or kind not in PRETRAINED:
        raise ConfigError(f"{source / 'config.json'}: model_type={kind!r}, one of {', '.join(PRETRAINED)} is needed")
    if not (source / "tokenizer.json").is_file() and not (source / "vocab.json").is_file():
        raise ConfigError(f"{source}: neither tokenizer.json nor vocab.json and merges.txt in it")
    if (source / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(source / "tokenizer.json")
        shutil.copyfile(source / "tokenizer.json", run.tokenizer)
    else:
        tokenizer = Tokenizer.of_merges(source / "vocab.json", source / "merges.txt")
        tokenizer.save(run.tokenizer)
    tensors, _ = _read_weights(source)
    digest = hashlib.sha256("".join(sha256_of(path) for path in _weight_files(source)).encode()).hexdigest()
    return _save_pretrained(source, run, fields, tensors, tokenizer, digest)


def _import_gguf(source: Path, run: RunFolder) -> dict:
    fields, tensors, tokenizer = read_gguf(source)
    tokenizer = Tokenizer(tokenizer)
    tokenizer.save(run.tokenizer)
    return _save_pretrained(source, run, fields, tensors, tokenizer, sha256_of(source))


def _save_pretrained(
    source: Path, run: RunFolder, fields: dict, tensors: Tensors, tokenizer: Tokenizer, digest: str
) -> dict:
    config_of, params_of = PRETRAINED[fields["model_type"]]
    config = config_of(fields, str(source))
    num_rows, num_tokens = needed(fields, "vocab_size", str(source)), tokenizer.vocab_size
    if num_tokens > num_rows:
        raise ConfigError(
            f"{source}: its tokenizer has {num_tokens} tokens with the one between documents, but vocab_size={num_rows}"
        )
    if num_tokens < num_rows:
        warn(f"{source}: vocab_size={num_rows}, of which {num_rows - num_tokens} are no tokens; they are left out")
    params = jax.tree.map(jnp.asarray, params_of(tensors, fields, config.model, num_tokens, str(source)))
    manifest = {"source": source.name, "sha256": digest, "documents": [], "tokenizer": sha256_of(run.tokenizer)}
    run.write_manifest(manifest)
    config.save(run.config)
    controllers = Controllers.init(config.router, config.model.pool_size)
    return _save(run, 0, {"params": params, "controllers": controllers}, fields["model_type"], tensors)


def _save(run: RunFolder, step: int, trees: dict, kind: str, tensors: Tensors) -> dict:
    with Checkpoints(run.checkpoints) as checkpoints:
        checkpoints.save(step, trees)
    num_parameters = sum(x.size for x in tensors.values())
    return {"format": kind, "step": step, "tensors": len(tensors), "parameters": num_parameters}


def _copy(run: RunFolder, folder: Path) -> None:
    """What is beside a run's checkpoints, to where it has the same names."""
    for path in (run.config, run.tokenizer, run.manifest):
        shutil.copyfile(path, folder / path.name)


@contextlib.contextmanager
def _new_folder(path: Path, flag: str) -> Iterator[Path]:
    """A folder that gets its name when all is in it, and otherwise goes."""
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{flag}={path}: is there already; a new folder is needed")
    new_parents = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not path.exists():
            for parent in new_parents:
                parent.rmdir()


def _flat(tree: dict) -> Tensors:
    """Every array by its place in the tree: "pool.block.qkv"."""
    return {_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _unflat(tensors: Tensors, abstract: dict, where: str) -> dict:
    """The tree of that structure. Raises ConfigError when it needs other tensors."""
    left = dict(tensors)

    def take(path: tuple, want: jax.ShapeDtypeStruct) -> jax.Array:
        if (name := _name(path)) not in left:
            raise ConfigError(f"{where}: {name} is missing")
        x = left.pop(name)
        if (x.shape, x.dtype) != (want.shape, want.dtype):
            raise ConfigError(
                f"{where}: {name} is {x.dtype}{list(x.shape)}, but its config needs {want.dtype}{list(want.shape)}"
            )
        return jnp.asarray(x)

    tree = jax.tree.map_with_path(take, abstract)
    if left:
        raise ConfigError(f"{where}: {min(left)}: the model of its config has no such tensor")
    return tree


def _weight_files(folder: Path) -> list[Path]:
    """The files of tensors. Raises ConfigError when there are none, or the index names what is no file beside it."""
    if not (folder / INDEX).exists():
        if not (folder / WEIGHTS).is_file() and (folder / PICKLED).is_file():
            return [folder / PICKLED]
        if not (folder / WEIGHTS).is_file():
            raise ConfigError(f"{folder}: neither {WEIGHTS} nor {INDEX} in it")
        return [folder / WEIGHTS]
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{folder / INDEX}: has no weight_map")
    paths = [folder / str(name) for name in sorted({*weight_map.values()})]
    for path in paths:
        if path.parent != folder or not path.is_file():
            raise ConfigError(f"{path}: no such file; {INDEX} names it")
    return paths


def _read_weights(folder: Path) -> tuple[Tensors, dict]:
    """All tensors of a folder, and the metadata of its last file."""
    tensors, metadata = {}, {}
    for path in _weight_files(folder):
        if path.name == PICKLED:
            return _read_pickled(path), {}
        try:
            with safetensors.safe_open(path, framework="np") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except (safetensors.SafetensorError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: can't be read ({error})") from None
    return tensors, metadata


def _read_pickled(path: Path) -> Tensors:
    try:
        import torch
    except ImportError:
        raise ConfigError(f"{path}: PyTorch is needed to read it; pip install -r requirements-torch.txt") from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: x.float().numpy() for name, x in tensors.items()}
    except Exception as error:  # Of many classes.
        raise ConfigError(f"{path}: can't be read ({' '.join(str(error).split())[:200]})") from None


def _read_json(path: Path) -> dict:
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: a JSON object is needed")
    return fields


def _write_json(path: Path, fields: dict) -> None:
    write_whole(path, json.dumps(fields, indent=1) + "\n")
