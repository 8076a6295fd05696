"""Runs written as safetensors and read back; Llama's format, without `transformers` (tests/test_llama.py has it)."""

import json
import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from radialnet.checkpoint import Checkpoints
from radialnet.config import Config
from radialnet.data import prepare
from radialnet.interchange import export_run, import_run
from radialnet.llama import config_of_llama, llama_fields
from radialnet.optimizer import learning_rate, make_optimizer
from radialnet.run_folder import RunFolder
from radialnet.sections import VIEWS, ConfigError
from radialnet.tokenizer import BYTE_VOCAB_SIZE
from radialnet.trained import load_trained
from radialnet.trainer import train
from tests.commands import run
from tests.runs import make_run
from tests.tiny import AS_LLAMA, TOKEN_EXITS, Model, make_batch, make_config

FORMS = {
    "factored": {"model__prelude_layers": 1, "model__coda_layers": 2},
    "benefit": {"router__exit_training": "benefit"},
    "benefit of the token": TOKEN_EXITS,
    "early exit": {"router__form": "early_exit"},
    "hash exit": {"router__form": "hash_exit", "router__exit_training": "benefit"},
    "hash exit of the token": {"router__form": "hash_exit", **TOKEN_EXITS},
    "mod": {"router__form": "mod", "model__min_depth": 3},
    "recursion": {"router__form": "recursion", "model__pool_size": 3, "model__max_depth": 6},
    "skip": {"router__form": "skip"},
    "hash": {"router__form": "hash", "model__qk_norm": False},
    "other layers": {
        "model__norm": "layer",
        "model__mlp": "relu",
        "model__biases": True,
        "model__positions": "learned",
        "model__max_positions": 19,
    },
}
DOCS = Path(__file__).parents[1] / "docs" / "INTERCHANGE.md"


def assert_same_bits(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, (ours.params, ours.controllers), (theirs.params, theirs.controllers))


def told_shapes(name: str, config: Config) -> list[tuple[int, ...]]:
    """The shapes of a tensor by docs/INTERCHANGE.md: the naming is a promise, and it tells all of it."""
    model = config.model
    num_layers = {"prelude": model.prelude_layers, "coda": model.coda_layers}.get(name.split(".")[0], model.pool_size)
    sizes = {"V": BYTE_VOCAB_SIZE, "D": model.d_model, "L": num_layers, "T": model.max_depth, "F": model.d_ff}
    sizes |= {
        "H": model.num_heads,
        "G": model.num_kv_heads,
        "K": model.head_size,
        "R": config.router.hidden_size(model),
    }
    sizes["X"] = model.max_positions
    sizes["rounds"] = model.max_depth // model.pool_size
    row = re.search(rf"^\| `{re.sub('^(prelude|coda)', 'pool', name)}` \|.*", DOCS.read_text(), re.MULTILINE)[0]
    shapes = re.findall(r"\[(.*?)\]", row.replace("·", "*").replace("/", "//"))
    # Sizes and arithmetic of a table in this repository.
    return [tuple(eval(f"[{shape}]", {}, sizes)) for shape in shapes]


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_bit_for_bit(tmp_path, form):
    original = make_run(tmp_path / "run", make_config(router__hidden=7, **FORMS[form]))
    found = export_run(original, tmp_path / "out", "radialnet")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "manifest.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert import_run(tmp_path / "out", tmp_path / "back") == {"format": "radialnet", **found}
    ours, theirs = load_trained(original), load_trained(tmp_path / "back")
    assert_same_bits(ours, theirs)
    assert (ours.step, ours.config, found["step"]) == (theirs.step, theirs.config, 3)
    for name in ("config.json", "tokenizer.json", "manifest.json"):
        assert (original / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    for name, x in tensors.items():
        assert x.shape in told_shapes(name, ours.config) and x.dtype == np.float32, name


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Of a little text, and the config of a plain run on it."""
    text, cache = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("cache")
    for index in range(20):
        (text / f"{index}.txt").write_text(f"document {index}: " + "the quick brown fox " * 3 * (index + 1))
    data = {"source": "text", "path": str(text), "tokenizer": "byte", "eval_fraction": 0.3, "cache_dir": str(cache)}
    more = {"optimizer__warmup_steps": 0, "log__every_steps": 1, "log__sample_prompt": "", "train__num_steps": 5}
    config = make_config(**AS_LLAMA, **more, **{f"data__{name}": value for name, value in data.items()})
    return config, prepare(config, RunFolder(text / "none"))


@pytest.mark.slow
def test_training_goes_on_in_a_run_that_was_read_in(tmp_path, dataset):
    """With a fresh optimizer, at the learning rate of the step."""
    config, data = dataset
    export_run(make_run(tmp_path / "run", config, data), tmp_path / "out", "radialnet")
    import_run(tmp_path / "out", tmp_path / "back")
    folder = RunFolder(tmp_path / "back")
    train(config, folder.root)
    lines = [line for line in folder.read_metrics() if line["split"] == "train"]
    assert [line["step"] for line in lines] == [4, 5]
    assert lines[0]["lr"] == pytest.approx(float(learning_rate(config)(3)))
    trained = load_trained(folder.root)
    assert trained.step == 5
    optimizer = jax.eval_shape(make_optimizer(config).init, trained.params)
    with Checkpoints(folder.checkpoints) as checkpoints:
        adam, _, schedule = checkpoints.restore(5, {"optimizer": optimizer})["optimizer"]
    assert (adam.count, schedule.count) == (2, 5)


@pytest.mark.slow
def test_up_cycled_from_a_llama(tmp_path, dataset):
    """A learning rate of 0 leaves what was read in; norms and rotary positions must be those of the Llama."""
    config, data = dataset
    export_run(make_run(tmp_path / "run", config, data), tmp_path / "llama", "llama")
    import_run(tmp_path / "llama", tmp_path / "dense")
    fields = config.to_dict()
    fields["model"] |= {"init": "upcycle", "upcycle_from": str(tmp_path / "dense")}
    fields["train"]["num_steps"], fields["optimizer"]["learning_rate"] = 1, 0.0
    for field, value in (("qk_norm", True), ("norm_eps", 1e-6), ("rope_base", 500.0)):
        other = {**fields, "model": {**fields["model"], field: value}}
        with pytest.raises(ConfigError, match=f"config.model.{field}={value}, but .* was trained with"):
            train(Config.from_dict(other), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    train(Config.from_dict(fields), tmp_path / "grown")
    ours, theirs = load_trained(tmp_path / "run"), load_trained(tmp_path / "grown")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours.params, theirs.params)


def test_layers_of_prelude_and_coda_become_layers_of_the_pool(tmp_path):
    """In another view, too: the imported model has 6 layers, and the logits of the 3 stacks."""
    config = make_config(**AS_LLAMA, model__prelude_layers=1, model__coda_layers=2, cache__view="same_step")
    ours = load_trained(make_run(tmp_path / "run", config))
    export_run(tmp_path / "run", tmp_path / "llama", "llama")
    found = import_run(tmp_path / "llama", tmp_path / "back")
    theirs = load_trained(tmp_path / "back")
    assert (found["step"], theirs.config.model.pool_size, theirs.config.cache.view) == (0, 6, "same_layer")
    batch = make_batch(config, packed=True)
    logits = [Model.of(trained)(batch).logits_BSV for trained in (ours, theirs)]
    np.testing.assert_allclose(*(x[batch["document"] >= 0] for x in logits), atol=1e-5)
    manifest = json.loads((tmp_path / "back" / "manifest.json").read_text())
    assert (manifest["source"], manifest["documents"]) == ("llama", [])


def test_shards_and_half_precision(tmp_path):
    export_run(make_run(tmp_path / "run", make_config(**AS_LLAMA)), tmp_path / "llama", "llama")
    tensors = safetensors.flax.load_file(tmp_path / "llama" / "model.safetensors")
    (tmp_path / "llama" / "model.safetensors").unlink()
    # As older files have them, with a buffer.
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": jnp.ones(2)}
    weight_map = {}
    for part, dtype in enumerate((jnp.bfloat16, jnp.float16)):
        names = sorted(tensors)[part::2]
        weight_map |= dict.fromkeys(names, f"part-{part}.safetensors")
        half = {name: tensors[name].astype(dtype) for name in names}
        safetensors.flax.save_file(half, tmp_path / "llama" / f"part-{part}.safetensors")
    index = tmp_path / "llama" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    import_run(tmp_path / "llama", tmp_path / "back")
    ours, theirs = load_trained(tmp_path / "run").params, load_trained(tmp_path / "back").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-7), ours, theirs)
    assert theirs["head"].dtype == np.float32 and not np.array_equal(ours["head"], theirs["head"])
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, "../llama/part-0.safetensors")}))
    with pytest.raises(ConfigError, match="part-0.safetensors: no such file"):
        import_run(tmp_path / "llama", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "overrides, named",
    [
        ({"router__form": "factored", "router__prior": "none"}, "config.router.form='factored'"),
        ({"router__form": "cyclic"}, "config.router.form='cyclic'"),
        ({"model__qk_norm": True}, "config.model.qk_norm=True"),
        ({"cache__view": "all"}, "config.cache.view='all'"),
        ({"cache__view": "first"}, "config.cache.view='first'"),
    ],
)
def test_what_no_llama_is_equal_to(overrides, named):
    with pytest.raises(ConfigError, match=re.escape(f"no Llama is equal to this run, {named}")):
        llama_fields(make_config(**{**AS_LLAMA, **overrides}), 17, 0)


def test_which_views_are_plain():
    """tests/test_model.py shows that they are, and that the others differ."""
    plain = set()
    for view in VIEWS:
        try:
            llama_fields(make_config(**AS_LLAMA, cache__view=view), 17, 0)
            plain.add(view)
        except ConfigError:
            pass
    assert plain == {"latest", "same_step", "same_layer"}
    # With one layer there are no entries of other steps.
    one = {**AS_LLAMA, "model__pool_size": 1, "model__max_depth": 1, "cache__view": "all", "router__depth_target": 1.0}
    assert config_of_llama(llama_fields(make_config(**one), 17, 0), "").cache.view == "latest"


LLAMA = {
    "model_type": "llama", "vocab_size": 9, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 6, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
}  # fmt: skip


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"model_type": "mistral"}, "model_type='mistral', only 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', only 'silu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"head_dim": 8}, "head_dim · num_attention_heads=48, only 24"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"num_attention_heads": "6"}, "num_attention_heads='6'"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"num_key_value_heads": 4}, "config.model.num_kv_heads=4 does not divide"),
        ({"num_key_value_heads": 1.5}, "num_key_value_heads=1.5, a whole number"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps='x', a number above 0 is needed"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta=None, a number above 0"),
        ({"rope_parameters": "x"}, "rope_parameters='x', an object is needed"),
        ({"max_position_embeddings": 1.5}, "max_position_embeddings=1.5, a whole number"),
    ],
)
def test_llamas_that_can_not_be_represented(fields, named):
    with pytest.raises(ConfigError, match="config.json: .*" + re.escape(named)):
        config_of_llama({**LLAMA, **fields}, "config.json")


def test_fields_of_a_llama():
    model = config_of_llama(LLAMA, "").model
    assert (model.rope_base, model.num_kv_heads, model.norm_eps, model.qk_norm) == (500.0, 6, 1e-6, False)
    older = {**LLAMA, "rope_parameters": None, "rope_theta": 700, "rms_norm_eps": 1e-5, "num_key_value_heads": 2}
    model = config_of_llama(older, "").model
    assert (model.rope_base, model.num_kv_heads, model.norm_eps, model.min_depth) == (700.0, 2, 1e-5, 2)


def test_what_is_wrong_with_a_folder(tmp_path):
    """One line each, and no run folder."""
    export_run(make_run(tmp_path / "run", make_config(**AS_LLAMA)), tmp_path / "llama", "llama")
    file = tmp_path / "llama" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "model.layers.1.mlp.up_proj"

    def fails(match):
        with pytest.raises(ConfigError, match=match):
            import_run(tmp_path / "llama", tmp_path / "back")
        assert not list(tmp_path.glob("*back*"))

    for changed, match in (
        ({name + ".weight": tensors[name + ".weight"].T.copy()}, r"up_proj.weight is \[24, 20\], .* \[20, 24\]"),
        ({name + ".bias": np.zeros(20, np.float32)}, "up_proj.bias: a radial network has no such tensor"),
        ({"lm_head.weight": None}, "lm_head.weight is missing"),
    ):
        wrong = {key: x for key, x in {**tensors, **changed}.items() if x is not None}
        safetensors.numpy.save_file(wrong, file)
        fails(match)
    file.write_bytes(file.read_bytes()[:-9])
    fails("model.safetensors: can't be read")
    file.unlink()
    fails("neither model.safetensors nor")
    config = tmp_path / "llama" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 257', '"vocab_size": 200'))
    safetensors.numpy.save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"][:200]}, file)
    fails("its tokenizer has 257 tokens .* vocab_size=200")
    config.write_text("[]")
    fails("a JSON object is needed")


def test_rows_that_fill_the_vocabulary_up(tmp_path, capsys):
    export_run(make_run(tmp_path / "run", make_config(**AS_LLAMA)), tmp_path / "llama", "llama")
    config, file = tmp_path / "llama" / "config.json", tmp_path / "llama" / "model.safetensors"
    config.write_text(config.read_text().replace('"vocab_size": 257', '"vocab_size": 260'))
    tensors = safetensors.numpy.load_file(file)
    filled = {name: np.pad(x, ((0, 3), (0, 0)), constant_values=9) for name, x in tensors.items() if len(x) == 257}
    assert len(filled) == 2
    safetensors.numpy.save_file({**tensors, **filled}, file)
    import_run(tmp_path / "llama", tmp_path / "back")
    assert "3 are no tokens" in capsys.readouterr().err
    ours, theirs = load_trained(tmp_path / "run").params, load_trained(tmp_path / "back").params
    np.testing.assert_array_equal(ours["head"], theirs["head"])


def permuted(x_XD, heads):
    """Rows as llama.cpp has them: what lies at i and i + K/2 of a head, side by side."""
    size = len(x_XD) // heads
    order = [head * size + pair + half for head in range(heads) for pair in range(size // 2) for half in (0, size // 2)]
    return np.ascontiguousarray(x_XD[order])


def test_gguf(tmp_path):
    """A file of the same Llama: tied, with fp16 matrices, and its tokenizer in the metadata."""
    gguf = pytest.importorskip("gguf")
    from radialnet.gguf_file import _FIELDS, _NAMES

    export_run(make_run(tmp_path / "run", make_config(**AS_LLAMA)), tmp_path / "llama", "llama")
    config, file = tmp_path / "llama" / "config.json", tmp_path / "llama" / "model.safetensors"
    fields, tensors = json.loads(config.read_text()), safetensors.numpy.load_file(file)
    tensors = {name: x.astype(np.float16) if x.ndim > 1 else x for name, x in tensors.items() if name[:7] != "lm_head"}
    safetensors.numpy.save_file(tensors, file)
    config.write_text(json.dumps({**fields, "tie_word_embeddings": True}))
    import_run(tmp_path / "llama", tmp_path / "by_folder")

    def write(path, architecture="llama", pre="gpt-2", **more):
        writer = gguf.GGUFWriter(path, architecture)
        for name, key in _FIELDS.items():
            if name != "head_dim":
                writer.add_uint32(f"llama.{key}", fields[name])
        writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
        writer.add_rope_freq_base(fields["rope_theta"])
        for key, value in more.items():
            writer.add_string(key.replace("__", "."), value)
        tokenizer = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
        tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token == "<|document|>" else 1 for token in tokens])
        writer.add_token_merges([])
        theirs = {ours: name for name, ours in _NAMES.items()}
        for name, x in tensors.items():
            parts = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name)
            if parts[2].endswith(("q_proj", "k_proj")):
                x = permuted(x, 6 if parts[2].endswith("q_proj") else 2)
            writer.add_tensor((f"blk.{parts[1]}." if parts[1] else "") + f"{theirs[parts[2]]}.weight", x)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    import_run(write(tmp_path / "a.gguf"), tmp_path / "by_file")
    ours, theirs = load_trained(tmp_path / "by_folder"), load_trained(tmp_path / "by_file")
    assert_same_bits(ours, theirs)
    assert ours.config == theirs.config
    text = "def f(x):\n    return 'é' + 12"
    assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)
    assert theirs.tokenizer.decode(theirs.tokenizer.encode(text)) == text
    for given, match in (
        ({"architecture": "qwen2"}, "general.architecture='qwen2'"),
        ({"pre": "nobody"}, "tokenizer.ggml.pre='nobody'"),
        ({"llama__rope__scaling__type": "yarn"}, "rope_type='yarn'"),
    ):
        with pytest.raises(ConfigError, match=match):
            import_run(write(tmp_path / "b.gguf", **given), tmp_path / "never")
    (tmp_path / "c.gguf").write_text("no")
    with pytest.raises(ConfigError, match="c.gguf: not a GGUF file"):
        import_run(tmp_path / "c.gguf", tmp_path / "never")
    assert not list(tmp_path.glob("*never*"))


@pytest.mark.slow
def test_asked_to_end_it_leaves_no_part_of_a_folder(tmp_path):
    script = f"""
        import os, signal
        from pathlib import Path
        from radialnet import cli, interchange

        def main():
            with interchange._new_folder(Path({str(tmp_path / "new")!r}), "--out") as partial:
                (partial / "half").write_text("")
                os.kill(os.getpid(), signal.SIGTERM)

        cli.run(main)
    """
    run("-c", textwrap.dedent(script), code=143)
    assert not list(tmp_path.iterdir())


def test_the_commands(tmp_path):
    workdir = make_run(tmp_path / "run", make_config(**FORMS["hash"]))
    flags = [f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]
    stdout, _ = run("-m", "radialnet.export", *flags, "--json")
    found = json.loads(stdout.splitlines()[-1])
    assert (found["format"], found["step"], found["out"]) == ("radialnet", 3, str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="--out=.*out: is there already"):
        export_run(workdir, tmp_path / "out", "radialnet")
    stdout, _ = run("-m", "radialnet.import", f"--from={tmp_path / 'out'}", f"--workdir={tmp_path / 'back'}")
    assert f"{found['parameters']:,} parameters" in stdout
    assert_same_bits(load_trained(workdir), load_trained(tmp_path / "back"))
    flags[1] = f"--out={tmp_path / 'llama'}"
    _, stderr = run("-m", "radialnet.export", *flags, "--format=llama", code=2)
    assert stderr.count("\n") == 1 and "config.router.form='hash'" in stderr
    assert not list(tmp_path.glob("*llama*"))
