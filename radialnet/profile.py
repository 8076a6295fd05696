"""How much each layer of a model puts into the state of a token: residual ratios ‖f(x)‖ / ‖x + f(x)‖.

    python -m radialnet.profile --model=PATH[,PATH2…] [--data=PATH] [--out=DIR] [--max_tokens=N] [--skip_first=K]
                                [--json]

PATH is a run folder of ours, a folder of `transformers` (OPT, GPT-2, Llama, BERT, ViT, ResNet and relatives), or a GGUF
file of one. The latter two need `pip install -r requirements-torch.txt`. DIR gets profile.json, box plots by layer and,
of several models, their medians against their parameters. docs/PROFILES.md has figures and says what they mean.
"""

import json
from pathlib import Path

from absl import flags

from radialnet import cli
from radialnet.checks import expanded
from radialnet.comparisons import plot_medians, plot_residuals
from radialnet.evaluate import eval_rows
from radialnet.files import finite, write_whole
from radialnet.residuals import MEDIAN, Place, Profile, profile_run, quantiles
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.sources import documents
from radialnet.torch_residuals import check_kind, kind_of, profile_torch
from radialnet.trained import load_trained


def profile(path: Path, kind: str | None, data: Path | None, max_tokens: int, skip_first: int) -> Profile:
    """The profile of a model of any kind (`kind_of`; None for a run of ours). Raises ConfigError."""
    if kind is not None:
        found = profile_torch(path, lambda: documents(data), data, max_tokens, skip_first)
    else:
        trained = load_trained(path)
        told = f"text of {data}" if data else f"held-out part of its data ({trained.config.data.source})"
        rows = eval_rows(trained, path, data and str(data))
        found = profile_run(trained, rows, max_tokens, skip_first, path.absolute().name, told)
    if not found.num_tokens:
        raise ConfigError(f"--skip_first={skip_first}: leaves no token of {found.data}")
    return found


def show(found: Profile) -> None:
    print(
        f"{found.model}: {found.kind}, {found.norm}, {found.num_parameters:,} parameters"
        f"{f', {found.weights}' if found.weights else ''}\n"
        f"{found.num_tokens:,} tokens without the first {found.skip_first} of each row; {found.data}"
    )
    for what, places in (("layer", found.layers), ("step", found.steps)):
        if places:
            print(f"{what:>10}  {'tokens':>8}" + "".join(f"  {branch:>20}" for branch in found.branches))
        for place in places:
            print(f"{place.name:>10}  {place.num_tokens:>8,}" + _columns(place.ratios.values()))
    print(f"{'median':>10}  {'':>8}" + "".join(f"  {found.quantiles(b)[MEDIAN]:>6.3f}{'':14}" for b in found.branches))


def _columns(ratios) -> str:
    """The median of each branch, and where 90 % of its tokens lie."""
    found = [quantiles(ratio_N) for ratio_N in ratios]
    return "".join(f"  {values[MEDIAN]:>6.3f} {f'({values[0]:.3f}–{values[-1]:.3f})':>13}" for values in found)


def write(profiles: list[Profile], out: Path) -> None:
    """profile.json and the plots."""
    out.mkdir(parents=True, exist_ok=True)
    names = [found.model for found in profiles]
    for index, found in enumerate(profiles):
        # Runs in folders of different places may be called the same.
        name = found.model if names.count(found.model) == 1 else f"{index}-{found.model}"
        _draw(found, found.layers, "layer", out / f"{name}.png")
        if found.steps:
            _draw(found, found.steps, "depth step", out / f"{name}-steps.png")
    if len(profiles) > 1:
        medians = [found.summary()["median"] for found in profiles]
        sizes = [found.num_parameters for found in profiles]
        plot_medians(list(zip(names, sizes, medians, strict=True)), out / "parameters.png")
    write_whole(out / "profile.json", json.dumps(finite([found.summary() for found in profiles]), indent=1))


def _draw(found: Profile, places: list[Place], axis: str, path: Path) -> None:
    boxes = {branch: [quantiles(place.ratios[branch]) for place in places] for branch in found.branches}
    medians = {branch: found.quantiles(branch)[MEDIAN] for branch in found.branches}
    title = f"{found.model}, {found.norm}: {found.num_tokens:,} tokens"
    plot_residuals(boxes, medians, [place.name for place in places], axis, title, path)


def checked_kinds(paths: list[Path], data: Path | None, out: Path | None) -> list[str | None]:
    """`kind_of` all models, before the first takes its time. Raises ConfigError: what the flags name can't be so."""
    for flag, path in (*(("model", path) for path in paths), ("data", data)):
        if path is not None and not path.exists():
            raise ConfigError(f"--{flag}={path}: no such file or folder")
    if out and out.exists() and not out.is_dir():
        raise ConfigError(f"--out={out}: not a folder")
    kinds = [kind_of(path) for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        if kind is not None:
            check_kind(kind, path)
        elif not RunFolder(path).config.exists():
            raise ConfigError(
                f"--model={path}: a run folder, a folder of transformers (with a config.json) or a .gguf file is needed"
            )
    return kinds


def main() -> None:
    if not (paths := [expanded(path) for path in _MODEL.value if path]):
        raise ConfigError("--model=: run folders, folders of transformers or .gguf files are needed")
    data, out = (expanded(value) if value else None for value in (_DATA.value, _OUT.value))
    kinds, limits = checked_kinds(paths, data, out), (_MAX_TOKENS.value, _SKIP_FIRST.value)
    profiles = [profile(path, kind, data, *limits) for path, kind in zip(paths, kinds, strict=True)]
    if out:
        write(profiles, out)
    if not _JSON.value:
        for found in profiles:
            show(found)
        return
    summaries = finite([found.summary() for found in profiles])
    print(json.dumps(summaries[0] if len(summaries) == 1 else summaries))


if __name__ == "__main__":
    _MODEL = flags.DEFINE_list(
        "model", None, "Run folders, folders of transformers, or .gguf files, by commas.", required=True
    )
    _DATA = flags.DEFINE_string(
        "data",
        None,
        "A folder or file of text, or a .jsonl file, in place of held-out text; images for models of those.",
    )
    _OUT = flags.DEFINE_string("out", None, "A folder for profile.json and plots.")
    _MAX_TOKENS = flags.DEFINE_integer("max_tokens", 10_000, "About so many tokens of each model.", lower_bound=1)
    _SKIP_FIRST = flags.DEFINE_integer(
        "skip_first",
        1,
        "Positions left out at the beginning of each row: the first one takes the attention that has nowhere to go, so "
        "that its state is many times larger; in BERT and ViT it is the class token. A ResNet has none.",
        lower_bound=0,
    )
    _JSON = flags.DEFINE_bool("json", False, "Print a JSON line alone.")
    cli.run(main)
