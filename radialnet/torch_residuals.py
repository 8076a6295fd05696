"""Residual ratios of models of `transformers`, by hooks on their modules: requirements-torch.txt.

Of each branch f two things are looked at: what the module gives that computes f(x), and what comes where x + f(x) is.
So the model runs as it is, and what it adds to x is what is measured.
"""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from radialnet.residuals import Place, Profile
from radialnet.sections import ConfigError
from radialnet.sources import Source, evenly
from radialnet.torch_models import check_installed, load

if TYPE_CHECKING:
    import torch

# Tokens of a row of text; less where the model's context is shorter.
SEQ_LEN = 512
_IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# The photograph that comes with matplotlib.
_PHOTOGRAPH = "grace_hopper.jpg"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the branches of a kind of model are, by the names of its modules.

    Attributes:
        layers: the way to the list of layers; "*" for each of a list.
        branches: by name, within a layer: the module whose output is f(x), and the one whose first input is x + f(x);
            "" where that is what the layer gives.
        channels: the axis of channels.
    """

    layers: str
    branches: dict[str, tuple[str, str]]
    norm: str = "pre-norm"
    reads: str = "text"
    channels: int = -1

    def layers_of(self, model: "torch.nn.Module") -> list["torch.nn.Module"]:
        """Raises AttributeError: a module is not there."""
        found = [model]
        for name in self.layers.split("."):
            found = [child for module in found for child in (module if name == "*" else [module.get_submodule(name)])]
        layers = [layer for several in found for layer in several]
        for layer, name in ((layer, name) for layer in layers for pair in self.branches.values() for name in pair):
            layer.get_submodule(name)
        return layers


_LLAMA = Layout("layers", {"attention": ("self_attn.o_proj", "post_attention_layernorm"), "mlp": ("mlp.down_proj", "")})
# By model_type. Where several are given, they are those of different versions of the library.
LAYOUTS = {
    "bert": [
        Layout(
            "encoder.layer",
            {
                "attention": ("attention.output.dense", "attention.output.LayerNorm"),
                "mlp": ("output.dense", "output.LayerNorm"),
            },
            norm="post-norm",
        )
    ],
    "gpt2": [Layout("h", {"attention": ("attn.c_proj", "ln_2"), "mlp": ("mlp.c_proj", "")})],
    "llama": [_LLAMA],
    "mistral": [_LLAMA],
    "opt": [Layout("decoder.layers", {"attention": ("self_attn.out_proj", "final_layer_norm"), "mlp": ("fc2", "")})],
    "qwen2": [_LLAMA],
    "qwen3": [_LLAMA],
    "resnet": [
        Layout(
            "encoder.stages.*.layers",
            {"conv": ("layer", "activation")},
            norm="in the branch",
            reads="images",
            channels=1,
        )
    ],
    "vit": [
        Layout(
            "layers", {"attention": ("attention.o_proj", "layernorm_after"), "mlp": ("mlp.fc2", "")}, reads="images"
        ),
        Layout(
            "encoder.layer",
            {"attention": ("attention.output.dense", "layernorm_after"), "mlp": ("output.dense", "")},
            reads="images",
        ),
    ],
}
# OPT-350m and nothing else.
_OPT_POST_NORM = Layout(
    "decoder.layers",
    {"attention": ("self_attn.out_proj", "self_attn_layer_norm"), "mlp": ("fc2", "final_layer_norm")},
    norm="post-norm",
)


def kind_of(path: Path) -> str | None:
    """The model_type of a folder of transformers, "gguf" of a file of that, None of what is neither."""
    if path.suffix == ".gguf":
        return "gguf"
    try:
        return json.loads((path / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def check_kind(kind: str, path: Path) -> None:
    """Raise ConfigError: it is not known where the branches of such a model are; or what runs it is not installed."""
    if kind not in (*LAYOUTS, "gguf"):
        raise ConfigError(
            f"--model={path}: a model of the kind {kind!r}; {', '.join(LAYOUTS)}, GGUF files of these, and runs of "
            "radialnet are supported"
        )
    check_installed(path)


def layout_of(model: "torch.nn.Module") -> tuple[Layout, list["torch.nn.Module"]]:
    """Where the branches of a model are, and its layers.

    Raises:
        ConfigError: it is of another kind, or of a version of the library with other names.
    """
    import transformers

    kind = model.config.model_type
    check_kind(kind, Path(model.config.name_or_path))
    is_post_norm_opt = kind == "opt" and not model.config.do_layer_norm_before
    for layout in [_OPT_POST_NORM] if is_post_norm_opt else LAYOUTS[kind]:
        with contextlib.suppress(AttributeError):
            return layout, layout.layers_of(model)
    raise ConfigError(f"transformers {transformers.__version__} has other names for the modules of a {kind}")


Ratios = list[dict[str, list[np.ndarray]]]  # Of each layer, by branch, [N] of each input.


def measure(model: "torch.nn.Module", inputs: Iterable[dict], max_tokens: int, skip_first: int) -> list[Place]:
    """The ratios of a model's layers, by branch, over inputs of one row each, until there are enough tokens.

    Args:
        inputs: keyword arguments of the model. The last is run to its end.
        max_tokens: of the first layer, without those left out.
        skip_first: positions of each row that are left out; in a ResNet none is first.

    Raises:
        ConfigError: as `layout_of`; or there are no inputs.
    """
    import torch

    layout, layers = layout_of(model)
    skip_first = skip_first if layout.channels == -1 else 0
    found: Ratios = [collections.defaultdict(list) for _ in layers]

    def keep(layer: int, branch: str, ratio_N: "torch.Tensor") -> None:
        found[layer][branch].append(ratio_N[skip_first:].numpy())

    handles = [handle for index, layer in enumerate(layers) for handle in _watch(layer, layout, index, keep)]
    try:
        with torch.inference_mode():
            num_tokens = 0
            for arguments in inputs:
                model(**arguments)
                num_tokens += len(next(iter(found[0].values()))[-1])
                if num_tokens >= max_tokens:
                    break
    finally:
        for handle in handles:
            handle.remove()
    if not found[0]:
        raise ConfigError("--data: no text in it")
    order = (*layout.branches, "layer")
    return [
        Place(str(index), {branch: np.concatenate(ratios[branch]) for branch in order if branch in ratios})
        for index, ratios in enumerate(found)
    ]


def _watch(
    layer: "torch.nn.Module", layout: Layout, index: int, keep: Callable[[int, str, "torch.Tensor"], None]
) -> Iterator:
    """Hooks on a layer, which hand over the ratios of its branches as it runs."""
    import torch

    last_branch, seen = list(layout.branches)[-1], {}

    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(x.float(), dim=layout.channels).flatten()

    def begin(_, args, kwargs) -> None:
        seen["x"] = args[0] if args else kwargs["hidden_states"]

    def branch_gives(branch: str):
        # The norm at once: a ResNet adds x in place.
        return lambda _, args, output: seen.update({branch: norm(output)})

    def gets_sum(branch: str):
        return lambda _, args: add(branch, args[0])

    def gives_sum(branch: str):
        # Older versions give tuples.
        return lambda _, args, output: add(branch, output[0] if isinstance(output, tuple) else output)

    def add(branch: str, total: torch.Tensor) -> None:
        norm_N = norm(total)
        keep(index, branch, seen.pop(branch) / norm_N)
        if branch == last_branch and len(layout.branches) > 1:
            # All that the layer does to the stream, up to where its last sum is.
            keep(index, "layer", norm(total.float() - seen.pop("x").float().reshape(total.shape)) / norm_N)

    yield layer.register_forward_pre_hook(begin, with_kwargs=True)
    for branch, (gives, gets) in layout.branches.items():
        yield layer.get_submodule(gives).register_forward_hook(branch_gives(branch))
        if gets:
            yield layer.get_submodule(gets).register_forward_pre_hook(gets_sum(branch))
        else:
            yield layer.register_forward_hook(gives_sum(branch))


def profile_torch(
    path: Path, source: Callable[[], tuple[Source, str]], images: Path | None, max_tokens: int, skip_first: int
) -> Profile:
    """The profile of a folder of `transformers` or of a GGUF file.

    Args:
        source: opens the documents that models of text read, and tells what they are.
        images: the folder of those that models of images read; None: a photograph that comes with matplotlib.

    Raises:
        ConfigError: the model is of a kind that is not supported, or can't be read; or there is nothing to read for it.
    """
    import torch

    check_kind(load(path, "AutoConfig").model_type, path)
    model, loaded = load(path, "AutoModel", dtype=torch.float32, output_loading_info=True)
    layout, _ = layout_of(model.eval())
    missing = [name for name in loaded["missing_keys"] if not name.startswith("pooler.")]
    if missing:
        raise ConfigError(f"--model={path}: {min(missing)} is missing, of {len(missing)} tensors in all")
    if layout.reads == "text":
        documents, data = source()
        tokenizer = load(path, "AutoTokenizer")
        inputs = text_rows(documents, tokenizer, min(SEQ_LEN, model.config.max_position_embeddings), max_tokens)
    else:
        processor = load(path, "AutoImageProcessor")
        files, data = image_files(images)
        inputs = image_rows(files, processor)
    places = measure(model, inputs, max_tokens, skip_first)
    return Profile(
        model=path.stem if (is_gguf := path.suffix == ".gguf") else path.absolute().name,
        kind=model.config.model_type,
        norm=layout.norm,
        num_parameters=model.num_parameters(),
        num_tokens=places[0].num_tokens,
        skip_first=skip_first if layout.channels == -1 else 0,
        data=data,
        weights=f"dequantised {_quantisation(path)}" if is_gguf else "",
        layers=places,
        steps=[],
    )


def _quantisation(path: Path) -> str:
    """The type that most of the weights of a GGUF file have."""
    import gguf

    sizes = collections.Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    return sizes.most_common(1)[0][0]


def text_rows(documents: Source, tokenizer, seq_len: int, max_tokens: int) -> Iterator[dict]:
    """Rows of at most `seq_len` tokens, as the tokenizer begins and ends them, of documents all over a source.

    A few from the beginning of each document, so that so many tokens are of as many documents as can be.
    """
    import torch

    num_rows = -(-max_tokens // seq_len)
    chosen = list(evenly(len(documents), num_rows))
    for index in chosen:
        encoded = tokenizer(
            documents[index].content, truncation=True, max_length=seq_len, return_overflowing_tokens=True
        )["input_ids"]
        # Of a tokenizer that does not cut a text into rows, it is one.
        rows = encoded if encoded and isinstance(encoded[0], list) else [encoded]
        for row in rows[: -(-num_rows // len(chosen))]:
            if row:
                yield {"input_ids": torch.tensor([row])}


def image_files(folder: Path | None) -> tuple[list[Path], str]:
    """The images of a folder, or the photograph of matplotlib, and what they are. Raises ConfigError: there is none."""
    if folder is not None:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES)
        if not files:
            raise ConfigError(f"--data={folder}: no image in it; one of {', '.join(sorted(_IMAGES))} is needed")
        return files, f"{len(files)} images of {folder}"
    import matplotlib

    photograph = Path(matplotlib.get_data_path(), "sample_data", _PHOTOGRAPH)
    if not photograph.exists():
        raise ConfigError("--data: a folder of images is needed, for the matplotlib that is installed has none")
    return [photograph], f"one photograph ({_PHOTOGRAPH} of matplotlib): --data=FOLDER of yours tells more"


def image_rows(files: list[Path], processor) -> Iterator[dict]:
    """Images as the model's own processor makes them ready."""
    from PIL import Image

    for file in files:
        try:
            image = Image.open(file).convert("RGB")
        except OSError as error:
            raise ConfigError(f"{file}: not an image ({error})") from None
        yield {"pixel_values": processor(images=image, return_tensors="pt")["pixel_values"]}
