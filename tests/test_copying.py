"""What a run copies, against a search through the text and a model's log-probabilities one target at a time."""

import json

import jax
import numpy as np
import pytest

from radialnet.copying import copying_figures, repeated
from radialnet.data import eval_batches, held_out_rows
from radialnet.sources import Document
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer
from radialnet.trained import TrainedModel
from tests.commands import run
from tests.runs import make_run
from tests.tiny import Model, make_config


def searched(row, s):
    """`repeated` of one target, by looking for longer and longer ends of what was read in it."""
    start = np.flatnonzero(row["document"] == row["document"][s])[0]
    read, target = row["token"][start : s + 1].tolist(), int(row["target"][s])
    length = 0
    while length < 3:
        end = [*read[len(read) - length :], target]
        if length > len(read) or not any(read[i : i + len(end)] == end for i in range(len(read) - len(end) + 1)):
            break
        length += 1
    return length


def rows_of(seq_len, tokenizer):
    """Documents of few letters, one of them longer than a row and some that share one."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc"), size)) for size in (2 * seq_len, 5, 4, 7)]
    return held_out_rows([Document(str(i), text) for i, text in enumerate(texts)], tokenizer, seq_len)


def test_repeated_is_what_a_search_finds():
    rows = rows_of(13, Tokenizer.train([], BYTE_VOCAB_SIZE))
    found, expected = [], []
    for row in (rows[index] for index in range(len(rows))):
        repeated_S = repeated(row["token"], row["target"], row["document"])
        found += repeated_S[row["is_target"]].tolist()
        expected += [searched(row, s) for s in np.flatnonzero(row["is_target"])]
    assert found == expected and set(found) == {0, 1, 2, 3}
    assert max(len(set(rows[index]["document"])) for index in range(len(rows))) > 2, "documents share a row"


def test_repeated_by_hand():
    token, target = np.array([5, 6, 7, 5, 6, 7, 5, 6]), np.array([6, 7, 5, 6, 7, 5, 6, 9])
    assert repeated(token, target, np.zeros(8, int)).tolist() == [0, 0, 1, 2, 3, 3, 3, 0]
    # A document knows nothing of the one before.
    assert repeated(token, target, np.array([0, 0, 0, 1, 1, 1, 1, 1])).tolist() == [0, 0, 1, 0, 0, 1, 2, 0]


def test_figures_are_means_over_the_targets_of_each_kind():
    model = Model(make_config(), vocab_size=BYTE_VOCAB_SIZE).with_mixed_exits()
    trained = TrainedModel(
        model.config, model.graph, model.params, model.controllers, Tokenizer.train([], BYTE_VOCAB_SIZE), 7
    )
    rows, bias = rows_of(model.config.train.seq_len, trained.tokenizer), 0.4
    of_kind = {n: [] for n in range(4)}
    for batch in eval_batches(rows, model.config.train.batch_size, 0):
        output = model(batch, controllers=model.controllers.lean(bias), at=model.at.for_evaluation())
        log_p_BSV = np.asarray(jax.nn.log_softmax(output.logits_BSV))
        for b, s in np.argwhere(batch["is_target"]):
            row = {name: x_BS[b] for name, x_BS in batch.items()}
            of_kind[searched(row, s)].append((-log_p_BSV[b, s, row["target"][s]], int(output.depth_BS[b, s])))
    found = copying_figures(trained, rows, bias)
    everything = [target for kind in of_kind.values() for target in kind]
    assert found["step"] == 7 and found["targets"] == len(everything)
    for line, kind in zip([found, *found["by_repeated"]], [everything, *of_kind.values()], strict=True):
        ce, depth = np.mean(kind, axis=0)
        assert line["share"] == pytest.approx(len(kind) / len(everything))
        assert (line["ce"], line["depth"]) == (pytest.approx(ce, rel=1e-5), pytest.approx(depth))
    assert 1 < found["depth"] < 3, "tokens leave at different depths"
    assert copying_figures(trained, rows, -100.0)["depth"] == 3.0


def test_what_there_is_not_has_no_mean():
    model = Model(make_config(), vocab_size=BYTE_VOCAB_SIZE)
    trained = TrainedModel(
        model.config, model.graph, model.params, model.controllers, Tokenizer.train([], BYTE_VOCAB_SIZE), 0
    )
    found = copying_figures(trained, held_out_rows([Document("a", "abcd")], trained.tokenizer, 13), 0.0)
    assert [line["share"] for line in found["by_repeated"]] == [1.0, 0.0, 0.0, 0.0]
    assert found["by_repeated"][3]["ce"] is None and found["by_repeated"][0]["ce"] == pytest.approx(found["ce"])


@pytest.mark.slow
def test_the_command(tmp_path):
    make_run(tmp_path / "run", make_config())
    (tmp_path / "a.txt").write_text("some text and more of it " * 9)
    flags = ["-m", "radialnet.copying", f"--workdir={tmp_path / 'run'}", f"--data={tmp_path / 'a.txt'}"]
    stdout, _ = run(*flags)
    table, line = stdout.splitlines()[:-1], stdout.splitlines()[-1]
    found = json.loads(line)
    assert len(table) == 7 and table[5].startswith("      3 or more")
    assert sum(kind["share"] for kind in found["by_repeated"]) == pytest.approx(1)
    evaluated = json.loads(run("-m", "radialnet.evaluate", *flags[2:], "--json")[0])
    assert found["ce"] == pytest.approx(evaluated["ce"], rel=1e-5)
    assert run(*flags, "--json")[0].splitlines() == [line]
    _, stderr = run("-m", "radialnet.copying", f"--workdir={tmp_path}", code=2)
    assert stderr.startswith(f"error: {tmp_path}/config.json: no such file") and stderr.count("\n") == 1
