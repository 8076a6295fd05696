"""Models of `transformers`, by its own loaders, from a folder or a GGUF file: requirements-torch.txt."""

from pathlib import Path

from safetensors import SafetensorError

from radialnet.sections import ConfigError


def check_installed(path: Path) -> None:
    """Raise ConfigError: what reads the model at that path is not installed."""
    is_gguf = path.suffix == ".gguf"
    try:
        for name in ["torch", "transformers", *(["gguf", "accelerate"] if is_gguf else [])]:
            __import__(name)
    except ImportError as error:
        more = " and pip install gguf accelerate" if is_gguf else ""
        raise ConfigError(
            f"--model={path}: {error.name or error} is needed: pip install -r requirements-torch.txt{more}"
        ) from None


def load(path: Path, auto: str, **options):
    """What one of the Auto classes, `auto` by name, makes of the files at a path; nothing is asked of the network.

    Raises:
        ConfigError: it can't be read.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    file = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    where = {"pretrained_model_name_or_path": path.parent if file else path, "local_files_only": True, **file}
    try:
        return getattr(transformers, auto).from_pretrained(**where, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"--model={path}: can't be loaded by transformers ({reason})") from None
