"""A trained model under the lm-evaluation-harness, against forward passes of its own, `evaluate` and `generate`."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval")
import datasets

from radialnet import harness
from radialnet.evaluate import evaluate_trained
from radialnet.generate import generate
from radialnet.harness import RadialLM
from radialnet.lm_eval import evaluate_tasks, load_tasks, summary
from radialnet.sections import ConfigError
from radialnet.shards import PackedRows, Stream
from radialnet.sources import Document
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer
from radialnet.trained import TrainedModel
from tests.tiny import Model, make_config

SEQ, WIDTH = 29, 32  # A row of training; a row of the oracle, which is none of the adapter's.
MAX_DEPTH, ROWS = 4, 3


@pytest.fixture(scope="module")
def trained():
    """A model of bytes, whose tokens leave at different depths, and which writes ASCII without an end."""
    config = make_config(
        model__max_depth=MAX_DEPTH, router__exit_bias_init=-3.0, train__seq_len=SEQ, train__batch_size=ROWS
    )
    model = Model(config, vocab_size=BYTE_VOCAB_SIZE).with_mixed_exits()
    tokenizer = Tokenizer.train([], BYTE_VOCAB_SIZE)
    is_text_V = np.array([tokenizer.decode([token]).isascii() and token > 0 for token in range(BYTE_VOCAB_SIZE)])
    # Sharper, so that argmax is the same whatever the order of a sum is.
    params = {**model.params, "head": model.params["head"] * 20 * is_text_V}
    return TrainedModel(config, model.graph, params, model.controllers, tokenizer, 0)


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Nothing is asked of a hub, and nothing stays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


def text_of(num_bytes, seed=0):
    letters = list("abcdefgh ijklm\nnop")
    return "x" + "".join(np.random.default_rng(seed).choice(letters, num_bytes - 1))


def asks(*arguments):
    return SimpleNamespace(args=arguments, task_name="task")


def direct(trained, tokens, num_scored, max_depth=MAX_DEPTH):
    """Log-probability of the last tokens of a text, whether they are greedy, and the depths: alone in its row."""
    model, end = Model(trained.config), len(tokens) - 1
    index = np.arange(WIDTH, dtype=np.int32)[None]
    row = np.full((1, WIDTH), 7, np.int32)
    row[0, :end] = tokens[:-1]
    batch = {"token": row, "document": np.where(index < end, 0, -1), "position": index}
    given = {"params": trained.params, "controllers": trained.controllers, "at": model.at.for_evaluation()}
    output = model(batch, max_depth=max_depth, **given)
    log_p_SV = np.asarray(jax.nn.log_softmax(output.logits_BSV[0]))[:end]
    target_S = np.asarray(tokens[1:])
    scored = slice(end - num_scored, end)
    log_p_S = log_p_SV[np.arange(end), target_S]
    is_greedy = bool((log_p_SV.argmax(1) == target_S)[scored].all())
    return float(log_p_S[scored].sum()), is_greedy, np.asarray(output.depth_BS[0, :end])


def encode(trained, text):
    return [trained.tokenizer.separator_id, *trained.tokenizer.encode(text)]


@pytest.mark.slow
def test_likelihoods_are_those_of_whole_sequences_alone(trained):
    """Contexts of all lengths, none and too long ones too, side by side in rows of two widths."""
    greedy = generate(trained, "abc", 2)
    pairs = [
        ("", "ab"), ("abc", greedy), ("abc", "zz"), ("two  ", "words"), (text_of(20), " x"), (text_of(23), "yes"),
        (text_of(90, 1), " no"), ("q", text_of(SEQ, 2)), ("a", "b"),
    ]  # fmt: skip
    lm = RadialLM(trained, ROWS)
    before = harness._score._cache_size()
    found = lm.loglikelihood([asks(*pair) for pair in pairs], disable_tqdm=True)
    assert harness._score._cache_size() - before == 2
    depths = []
    for (context, continuation), (log_p, is_greedy) in zip(pairs, found, strict=True):
        tokens = encode(trained, context + continuation)[-SEQ - 1 :]
        num_scored = len(continuation) + len(context) - len(context.rstrip())
        expected, expected_greedy, depth_S = direct(trained, tokens, num_scored)
        assert log_p == pytest.approx(expected, abs=1e-4) and is_greedy == expected_greedy
        depths.append(depth_S)
    assert [is_greedy for _, is_greedy in found[:3]] == [False, True, False]
    depth_N = np.concatenate(depths)
    assert len(np.unique(depth_N)) > 2
    assert (lm.num_tokens["task"], lm.num_executed["task"]) == (len(depth_N), depth_N.sum())
    assert lm.num_cut["task"] == 2
    with pytest.raises(ConfigError, match=f"task task: a continuation of 30 .*config.train.seq_len={SEQ}"):
        lm.loglikelihood([asks("", text_of(SEQ + 1))])


def evaluated(trained, text, max_depth=MAX_DEPTH):
    rows = PackedRows(Stream.of([Document("a", text)], trained.tokenizer), SEQ)
    return evaluate_trained(trained, rows, max_depth, 0.0)


def test_a_continuation_that_merges_with_its_context_is_not_certain(trained):
    """The harness would leave it without a token, and the sum over none is the log of 1."""
    tokenizer = Tokenizer.train(["import os\n" * 50], BYTE_VOCAB_SIZE + 9)
    model = RadialLM(dataclasses.replace(trained, tokenizer=tokenizer), batch_size=2)
    whole = tokenizer.encode("import os")
    assert len(whole) <= len(tokenizer.encode("import o"))
    assert model._encode_pair("import o", "s") == (whole[:-1], whole[-1:])
    assert model._encode_pair("import", " os") == (tokenizer.encode("import"), tokenizer.encode(" os"))


def test_a_text_is_as_likely_as_evaluate_says(trained):
    """Shorter than a row, as long as some, and longer by a part, in which the harness would look back further."""
    texts = [text_of(length, length) for length in (SEQ - 8, 2 * SEQ, 2 * SEQ + 17)]
    lm = RadialLM(trained, ROWS)
    found = lm.loglikelihood_rolling([asks(text) for text in [*texts, ""]], disable_tqdm=True)
    assert found.pop() == 0
    by_evaluate = [evaluated(trained, text) for text in texts]
    for text, log_p, expected in zip(texts, found, by_evaluate, strict=True):
        assert -log_p / math.log(2) / len(text) == pytest.approx(expected["bpb"], abs=1e-4)
    alone = RadialLM(trained, ROWS)
    alone.loglikelihood_rolling([asks(texts[1])], disable_tqdm=True)
    assert alone.depth("task") == pytest.approx(by_evaluate[1]["depth"]) and alone.num_tokens["task"] == 2 * SEQ
    tokens = encode(trained, texts[2])
    own, further = (direct(trained, tokens[-size - 1 :], 17)[0] for size in (17, SEQ))
    assert abs(own - further) > 1e-2


@pytest.mark.slow
def test_what_is_written_is_what_generate_writes(trained):
    """Side by side, and cut at stop strings; a long context leaves room for what is to be written."""
    prompts = ["def ", "a", text_of(18), text_of(60, 1)]
    lm = RadialLM(trained, ROWS)
    found = lm.generate_until([asks(prompt, {"until": [], "max_gen_toks": 9}) for prompt in prompts], disable_tqdm=True)
    expected = [generate(trained, prompt, 9) for prompt in [*prompts[:3], prompts[3][-(SEQ - 10) :]]]
    assert found == expected and lm.num_cut["task"] == 1
    num_tokens = sum(1 + min(len(prompt), SEQ - 10) + 8 for prompt in prompts)
    assert lm.num_tokens["task"] == num_tokens and 1 < lm.depth("task") < MAX_DEPTH
    stop = expected[0][4:6]
    settings = {"until": stop, "max_gen_toks": 9, "do_sample": False, "temperature": 2.0, "num_beams": 1}
    assert lm.generate_until([asks(prompts[0], settings)]) == [expected[0][: expected[0].index(stop)]]


def test_draws_differ_by_request(trained, capsys):
    lm = RadialLM(trained, ROWS)
    settings = {"until": ["\0"], "max_gen_toks": 9, "do_sample": True, "temperature": 3.0, "num_beams": 1}
    drawn = lm.generate_until([asks("def ", settings)] * ROWS, disable_tqdm=True)
    assert len(set(drawn)) == ROWS
    assert capsys.readouterr().err == "warning: task task: generation_kwargs.num_beams: unknown, left out\n"
    with pytest.raises(ConfigError, match="task task: generation_kwargs.top_p=7: "):
        lm.generate_until([asks("def ", {**settings, "top_p": 7})], disable_tqdm=True)


def write_task(folder, name, kind, lines, **fields):
    """A task of the harness: a YAML file, which JSON is, and its data."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": str(data)}, "test_split": "train",
        "output_type": kind, **fields,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(task))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, trained):
    """A folder of three tasks, and what is to come out."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {"q": text_of(3 * index + 1, index), "choices": [f" {index}{letter}" for letter in "a{X"], "gold": index % 3}
        for index in range(7)
    ]
    write_task(
        folder, "choice", "multiple_choice", questions, doc_to_text="{{q}}", doc_to_choice="choices",
        doc_to_target="gold", metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    text = text_of(SEQ + 19)
    write_task(
        folder, "text", "loglikelihood_rolling", [{"text": text}], doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    )  # fmt: skip
    written = [{"q": text_of(5 * index + 2, index)} for index in range(4)]
    for index, line in enumerate(written):
        line["a"] = generate(trained, line["q"], 6) if index else "no"
    write_task(
        folder, "write", "generate_until", written, doc_to_text="{{q}}", doc_to_target="{{a}}",
        generation_kwargs={"until": [], "max_gen_toks": 6}, metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    return SimpleNamespace(folder=folder, questions=questions, text=text)


@pytest.mark.slow
def test_tasks_of_files_give_what_they_should_at_any_depth(trained, tasks):
    manager = load_tasks(["choice", "te*", "write"], tasks.folder, include_defaults=False)
    lm = RadialLM(trained, ROWS)
    results = evaluate_tasks(lm, manager)["results"]
    best = []
    for line in tasks.questions:
        texts = [encode(trained, line["q"] + choice) for choice in line["choices"]]
        best.append(np.argmax([direct(trained, tokens, 3)[0] for tokens in texts]))
    is_right = np.asarray(best) == [line["gold"] for line in tasks.questions]
    assert results["choice"]["acc,none"] == pytest.approx(is_right.mean()) and len(set(best)) > 1
    expected = evaluated(trained, tasks.text)
    assert results["text"]["bits_per_byte,none"] == pytest.approx(expected["bpb"], abs=1e-4)
    assert results["text"]["byte_perplexity,none"] == pytest.approx(2 ** expected["bpb"], rel=1e-4)
    assert results["write"]["exact_match,none"] == 0.75
    depths = {name: metrics["depth,none"] for name, metrics in results.items()}
    assert len(set(depths.values())) == 3 and all(1 < depth < MAX_DEPTH for depth in depths.values())

    found = summary(lm, {"results": results})
    assert found["depth"] == depths and json.loads(json.dumps(found, allow_nan=False)) == found
    early = RadialLM(trained, ROWS, exit_bias=1e6)
    assert evaluate_tasks(early, manager, limit=2)["results"]["text"]["depth,none"] == 1
    assert evaluate_tasks(RadialLM(trained, ROWS), manager)["results"] == results

    shallow = RadialLM(trained, ROWS, max_depth=1)
    at_1 = evaluate_tasks(shallow, load_tasks(["text"], tasks.folder, include_defaults=False))["results"]["text"]
    assert at_1["depth,none"] == 1 and shallow.num_tokens["text"] == lm.num_tokens["text"]
    assert abs(at_1["bits_per_byte,none"] - expected["bpb"]) > 1e-3


def test_examples_before_a_question(trained, tasks):
    counts = []
    for num_fewshot in (None, 1):
        manager = load_tasks([str(tasks.folder / "choice.yaml")], include_defaults=False)
        lm = RadialLM(trained, ROWS)
        results = evaluate_tasks(lm, manager, num_fewshot=num_fewshot, limit=3)
        assert results["n-shot"] == {"choice": num_fewshot or 0}
        assert results["n-samples"]["choice"]["effective"] == 3
        counts.append(lm.num_tokens["choice"])
    assert counts[0] < counts[1]


def test_tasks_that_are_not_there(tasks, tmp_path):
    with pytest.raises(ConfigError, match=r"^--tasks=choice,chioce: no task 'chioce'$"):
        load_tasks(["choice", "chioce"], tasks.folder, include_defaults=False)
    with pytest.raises(ConfigError, match="--include_path=.*nowhere: no such folder"):
        load_tasks(["choice"], tmp_path / "nowhere")
    write_task(tmp_path, "lost", "generate_until", [], doc_to_text="{{q}}", doc_to_target="{{a}}")
    (tmp_path / "lost.jsonl").unlink()
    with pytest.raises(ConfigError, match="--tasks=lost: can't be loaded .*lost.jsonl"):
        load_tasks(["lost"], tmp_path, include_defaults=False)
