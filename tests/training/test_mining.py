import json
import os
import signal
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from anysplade import (
    DataError,
    ModelError,
    OptionError,
    OutputError,
    Pair,
    TrainingConfig,
    load_encoder,
    load_pairs,
    mine,
    score,
    train,
)
from anysplade._common.files import only_process
from anysplade.training import mining as module
from processes import preloaded_context
from tiny import WORDS, make_tokenizer


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def cross_encoder(tmp_path):
    """A small one with random weights."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, max_position_embeddings=64, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


@pytest.mark.parametrize("miner", ["bm25", "model"])
def test_negatives_are_near_and_no_positives(miner, backbone, collection_folder, tmp_path):
    if miner == "model":
        load_encoder(backbone).save_pretrained(str(tmp_path / "model"))
    by = str(tmp_path / "model") if miner == "model" else miner
    mined = mine(str(collection_folder), tmp_path / "mined.jsonl", miner=by, negatives=2, margin=0)
    rows = read(tmp_path / "mined.jsonl")
    assert len(rows) == mined.examples
    assert mined.examples + mined.left_out == 40
    pairs = {pair.query: pair for pair in load_pairs(collection_folder)}
    for row in rows:
        assert row["positive"] == pairs[row["query"]].positive
        assert len(set(row["negatives"])) == 2
        assert row["positive"] not in row["negatives"]
    if miner == "bm25":  # they share a word with the query, as any document that BM25 finds
        assert all(set(row["query"].split()) & set(negative.split()) for row in rows for negative in row["negatives"])


@pytest.mark.parametrize("positive, margin, bound", [(10.0, 0.05, 9.5), (-10.0, 0.05, -10.5), (0.0, 0.5, 0.0), (10.0, 0.0, 10.0)])
def test_the_bound_lies_below_the_positive_whatever_its_sign(positive, margin, bound):
    assert module._bound(positive, margin) == pytest.approx(bound)


def test_the_teacher_reads_no_more_than_it_must():
    """Two negatives of each: first two candidates are read, then four more where these did not give two, then the rest."""
    pairs = [Pair("a", "positive"), Pair("b", "positive")]
    scores = {"positive": 10.0} | dict(zip("0123456789", [9.0, 9.6, 9.5, 3.0, 9.9, 2.0, 1.0, 9.9, 9.9, 1.0], strict=True))
    read = []

    def judge(asked):
        read.append([text for query, text in asked if query == "a"])
        return np.array([scores[text] for _, text in asked])

    candidates = [[1, 0, 4, 7, 8, 1, 5, 6], [3, 5, 6, 9]]
    chosen = module._below_the_positive(pairs, candidates, list("0123456789"), SimpleNamespace(scores=judge), 2, 0.05)
    assert chosen == [[0, 5, 6], [3, 5]]
    assert read == [["positive"], ["1", "0"], ["4", "7", "8", "1"], ["5", "6"]]


def test_a_likely_answer_is_no_negative(tmp_path):
    rows = [
        {"query": "kabel lodan", "positive": "kabel lodan mifil"},
        {"query": "sobel", "positive": "lodan kabel mifil nugor"},  # as good an answer to the first query
        {"query": "tubel", "positive": "kabel pecor rahan tubel vajim wekop xibel yocor zudan bafil cegor dohan fejim gikop kacor"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine(str(tmp_path / "pairs.jsonl"), tmp_path / "strict.jsonl", negatives=1, margin=0.3)
    mine(str(tmp_path / "pairs.jsonl"), tmp_path / "lax.jsonl", negatives=1, margin=0)
    assert read(tmp_path / "strict.jsonl")[0]["negatives"] == [rows[2]["positive"]]
    assert read(tmp_path / "lax.jsonl")[0]["negatives"] == [rows[1]["positive"]]


def test_from_mining_to_distillation(backbone, collection_folder, cross_encoder, tmp_path):
    mine(str(collection_folder), tmp_path / "mined.jsonl", negatives=2, margin=0)
    scored = score(str(tmp_path / "mined.jsonl"), tmp_path / "scored.jsonl", teacher=cross_encoder, max_length=32)
    rows = read(tmp_path / "scored.jsonl")
    assert scored.examples == len(rows) == len(read(tmp_path / "mined.jsonl"))
    assert all(len(row["scores"]) == 3 for row in rows)
    assert min(value for row in rows for value in row["scores"]) < 0  # logits, not probabilities
    options = {"objective": "kl + 0.05*margin-mse", "steps": 2, "batch_size": 4, "max_length": 16}
    assert train(TrainingConfig(backbone, str(tmp_path / "scored.jsonl"), output=str(tmp_path / "run"), **options)).steps == 2


def test_bm25_as_a_teacher_agrees_with_bm25_as_a_miner(collection_folder, tmp_path):
    mine(str(collection_folder), tmp_path / "mined.jsonl", negatives=3, margin=0)
    score(str(tmp_path / "mined.jsonl"), tmp_path / "scored.jsonl", teacher="bm25")
    for row in read(tmp_path / "scored.jsonl"):
        assert row["scores"][1:] == sorted(row["scores"][1:], reverse=True)
        assert min(row["scores"]) >= 0


def test_a_finished_output_is_not_made_again_and_another_not_overwritten(collection_folder, tmp_path, monkeypatch):
    first = mine(str(collection_folder), tmp_path / "mined.jsonl", negatives=2, margin=0)
    monkeypatch.setattr(module, "_searcher", None)  # nothing is searched
    assert mine(str(collection_folder), tmp_path / "mined.jsonl", negatives=2, margin=0) == first
    with pytest.raises(OutputError, match="not made from the same data and options"):
        mine(str(collection_folder), tmp_path / "mined.jsonl", negatives=1, margin=0)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        mine(str(collection_folder), tmp_path / "mine.txt", negatives=1)


def _slowly(data, output):
    module._BLOCK = 1
    searcher = module._searcher

    @contextmanager
    def slow(*arguments):
        with searcher(*arguments) as search:
            yield lambda *some: (time.sleep(0.05), search(*some))[1]

    module._searcher = slow
    mine(data, output, negatives=2, margin=0)


def test_killed_and_started_again(collection_folder, tmp_path, monkeypatch):
    whole = mine(str(collection_folder), tmp_path / "whole.jsonl", negatives=2, margin=0)
    process = preloaded_context().Process(target=_slowly, args=(str(collection_folder), tmp_path / "killed.jsonl"))
    process.start()
    parts = tmp_path / "killed.jsonl.parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("0*.jsonl"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = len(list(parts.glob("0*.jsonl")))
    assert 3 <= done < 40
    blocks = []
    monkeypatch.setattr(module, "_BLOCK", 1)
    searcher = module._searcher

    @contextmanager
    def counting(*arguments):
        with searcher(*arguments) as search:
            yield lambda *some: (blocks.append(1), search(*some))[1]

    monkeypatch.setattr(module, "_searcher", counting)
    again = mine(str(collection_folder), tmp_path / "killed.jsonl", negatives=2, margin=0)
    assert len(blocks) == 40 - done
    assert (again.examples, again.left_out) == (whole.examples, whole.left_out)
    assert (tmp_path / "killed.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not parts.exists()


def test_damaged_parts_and_outputs(collection_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_BLOCK", 8)
    data, options = str(collection_folder), {"negatives": 2, "margin": 0}
    whole = mine(data, tmp_path / "whole.jsonl", **options)
    output, parts = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"

    def until_the_end():
        with monkeypatch.context() as patch:
            patch.setattr(module, "provenance", lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                mine(data, output, **options)
        return sorted(parts.glob("0*.jsonl"))

    first, second, third, *_ = until_the_end()
    output.unlink()
    first.write_bytes(first.read_bytes()[:-30])
    second.write_bytes(b"")
    third.unlink()
    assert mine(data, output, **options).examples == whole.examples
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert caplog.text.count("is damaged; it is made again") == 2
    output.write_bytes(output.read_bytes()[:-30])
    with pytest.raises(OutputError, match=r"out\.jsonl: was changed after it was written; remove it"):
        mine(data, output, **options)
    output.unlink()
    until_the_end()
    output.unlink()
    (parts / "about.json").write_text("{")
    with only_process(parts), pytest.raises(OutputError, match="another process works there now"):
        mine(data, output, **options)
    assert mine(data, output, **options).examples == whole.examples
    (tmp_path / "out.jsonl.json").write_text("{")
    with pytest.raises(OutputError, match="was not made from the same data"):
        mine(data, output, **options)


def test_a_miner_that_finds_nothing_at_all_is_not_asked_for_fewer(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"query": "?!", "positive": "kabel lodan"}\n')
    with pytest.raises(
        DataError, match="bm25 finds no document for any query, they have no words in common; try another"
    ) as caught:
        mine(str(tmp_path / "pairs.jsonl"), tmp_path / "a.jsonl", negatives=1)
    assert "fewer" not in str(caught.value)
    (tmp_path / "pairs.jsonl").write_text('{"query": "kabel", "positive": "kabel lodan"}\n')
    with pytest.raises(DataError, match="no example has enough negatives; ask for fewer"):
        mine(str(tmp_path / "pairs.jsonl"), tmp_path / "a.jsonl", negatives=1)


def test_chinese(tmp_path):
    rows = [("信息检索", "信息检索是一个分支"), ("首都北京", "北京是首都"), ("检索北京的信息", "在北京检索信息")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"query": q, "positive": p}) + "\n" for q, p in rows))
    assert mine(str(tmp_path / "pairs.jsonl"), tmp_path / "mined.jsonl", negatives=1, margin=0).examples == 3


def test_faults(backbone, collection_folder, tmp_path, cross_encoder):
    with pytest.raises(OptionError, match="negatives 0"):
        mine(str(collection_folder), tmp_path / "a.jsonl", negatives=0)
    with pytest.raises(DataError, match="no negatives to score"):
        score(str(collection_folder), tmp_path / "a.jsonl", teacher="bm25")
    (tmp_path / "alone.jsonl").write_text(json.dumps({"query": WORDS[0], "positive": WORDS[1]}) + "\n")
    with pytest.raises(DataError, match="no example has enough negatives"):
        mine(str(tmp_path / "alone.jsonl"), tmp_path / "b.jsonl")
    assert not (tmp_path / "b.jsonl").exists()
    assert not (tmp_path / "b.jsonl.parts").exists()
    (tmp_path / "n.jsonl").write_text(json.dumps({"query": WORDS[0], "positive": WORDS[1], "negative": WORDS[2]}) + "\n")
    with pytest.raises(ModelError, match="a masked LM that was not trained to retrieve"):
        score(str(tmp_path / "n.jsonl"), tmp_path / "untrained.jsonl", teacher=backbone)
    with pytest.raises(ModelError, match="no such model folder"):
        score(str(tmp_path / "n.jsonl"), tmp_path / "c.jsonl", teacher=str(tmp_path / "nowhere"))


def test_the_language_of_bm25(tmp_path):
    """It is that of the documents, and recorded unless it is English, which earlier records do not have."""
    german = ["Der Hund schläft nicht im Haus", "Die Katzen sind auf dem Dach", "Das Dach ist mit der Zeit alt geworden"]
    queries = ["Häuser", "Dächer", "Alte"]
    rows = [json.dumps({"query": query, "positive": text}) for query, text in zip(queries, german, strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    mined = mine(str(tmp_path / "pairs.jsonl"), tmp_path / "auto.jsonl", negatives=1, margin=0)
    assert mined.about["language"] == "german"
    assert [row["query"] for row in read(tmp_path / "auto.jsonl")] == ["Dächer"]
    scored = score(str(tmp_path / "auto.jsonl"), tmp_path / "scored.jsonl", teacher="bm25", language="en")
    assert "language" not in scored.about
    assert read(tmp_path / "scored.jsonl")[0]["scores"] == [0, 0]
    with pytest.raises(OptionError, match="did you mean german"):
        mine(str(tmp_path / "pairs.jsonl"), tmp_path / "other.jsonl", negatives=1, language="germn")
