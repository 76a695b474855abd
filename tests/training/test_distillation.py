import json
import random

import pytest
from sentence_transformers import SparseEncoder

from anysplade import DataError, Document, ModelError, OptionError, OutputError, Pair, distil, load_pairs
from anysplade.cli import main
from anysplade.training import distillation as module
from anysplade.training.distillation_pairs import EXAMPLES, add_negatives, hold_out_pairs
from anysplade.training.estimates import Speed
from tiny import WORDS

OPTIONS = {"steps": 3, "batch_size": 4, "max_length": 32, "query_active_dims": 4, "document_active_dims": 8}
ROWS = ["dense", "bm25", "sparse", "sparse + 3 × bm25", "dense and bm25, fused (wsum)"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents of 24 words, enough to hold some out."""
    generator = random.Random(0)
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = (" ".join(generator.choices(generator.sample(WORDS, 9), k=24)) for _ in range(220))
    file.write_text("".join(json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return file


@pytest.fixture(scope="module")
def distilled(teachers, corpus, tmp_path_factory):
    """The one run of this module, its folder, and what it said: stopped before the comparison, and continued."""
    run = tmp_path_factory.mktemp("distilled") / "run"

    def stop(*_, **__):
        raise KeyboardInterrupt

    said, cache = [], tmp_path_factory.mktemp("vectors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYSPLADE_CACHE", str(cache))
        patch.setattr("anysplade.model.runtimes.openvino_installed", lambda: False)
        patch.setattr(module, "_HEAD", {"steps": 2, "batch_size": 4})
        patch.setattr(module.logger, "info", lambda message, *values: said.append(message % values))
        with patch.context() as stopped:
            stopped.setattr(module, "evaluate", stop)
            with pytest.raises(KeyboardInterrupt):
                distil(teachers["dense"], str(corpus), run, progress=True, **OPTIONS)
        before = {name: (run / name).stat().st_mtime_ns for name in ("head/head.json", "training/training.json")}
        result = distil(teachers["dense"], str(corpus), run, progress=True, **OPTIONS)
    assert before == {name: (run / name).stat().st_mtime_ns for name in before}
    return result, run, said


def test_a_sparse_encoder_and_an_honest_comparison(distilled):
    result, run, _ = distilled
    SparseEncoder(result.model)
    assert result.model == str(run / "model")
    assert [row["model"] for row in result.rows] == ROWS
    assert all(0 <= row["nDCG@10"] <= 1 for row in result.rows)
    costs = {row["model"]: row["flops"] for row in result.rows}
    assert costs["sparse"] < costs["sparse + 3 × bm25"]  # the stems count too
    assert costs["dense"] == 32  # all dimensions
    assert (result.comparison["baseline"], result.comparison["model"][-8:]) == ("bm25", "+ 3 bm25")
    assert result.verdict in result.reason
    assert result.judged_by == "22 held-out pairs (22 sentence)"
    assert result.comparison["wins"] + result.comparison["ties"] + result.comparison["losses"] == result.queries == 22
    trained_on = load_pairs(run / "training.jsonl")
    assert result.trained_on == len(trained_on) <= 12  # no more than three batches of four
    assert all(len(pair.negatives) == 1 for pair in trained_on)


def test_what_each_stage_takes_is_said_before_it_begins(distilled):
    _, _, said = distilled
    stages = [line for line in said if " of 4: " in line]
    assert [line[:6] for line in stages] == ["1 of 4", "2 of 4", "4 of 4", "1 of 4", "4 of 4"]  # train_as says the third
    assert stages[1].startswith("2 of 4: a head, 2 steps of 4 texts, about ")
    assert "22 queries over 220 documents, about " in stages[2]
    speed = Speed(cut=10.0, whole=5.0)
    assert (speed.of_head(100), speed.of_training(100, 1), speed.of_comparison(10, 0)) == (
        "about 30 seconds",
        "about 2 minutes",
        "about 5 seconds",
    )


def test_a_finished_run_gives_the_stored_result(distilled, teachers, corpus, monkeypatch, capsys):
    result, run, _ = distilled
    monkeypatch.setattr(module, "write_examples", None)
    assert distil(teachers["dense"], str(corpus), run, **OPTIONS) == result
    options = (part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", str(value)))
    assert main(["distil", teachers["dense"], str(corpus), "--out", str(run), *options]) == 0
    text = capsys.readouterr().out
    assert text.endswith(f"next: anysplade index {run}/model {corpus} --lexical 3 --out INDEX\n")
    assert {"nDCG@10", "FLOPS"} < set(text.split())
    with pytest.raises(OutputError, match="other options \\(seed 0, now 1\\)"):
        distil(teachers["dense"], str(corpus), run, **OPTIONS, seed=1)
    content = corpus.read_text()
    corpus.write_text("\n".join(content.splitlines()[:-1]))
    try:
        with pytest.raises(OutputError, match="was made with another corpus"):
            distil(teachers["dense"], str(corpus), run, **OPTIONS)
    finally:
        corpus.write_text(content)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"lexical": 0}, OptionError, "`lexical` is 0"),
        ({"steps": 0}, OptionError, "steps is 0"),
        ({"kinds": ("titel",)}, OptionError, "'titel'"),
        ({"kinds": ("title",)}, DataError, "none of 220 documents gave a pair"),
        ({"batch_size": 500, "steps": 1}, OptionError, "there are 198 pairs to train on"),
    ],
)
def test_a_mistake_leaves_nothing(wrong, error, message, teachers, corpus, tmp_path):
    with pytest.raises(error, match=message):
        distil(teachers["dense"], str(corpus), tmp_path / "run", **OPTIONS | wrong)
    assert not (tmp_path / "run").exists()


def test_only_a_dense_model_without_a_head(teachers, corpus, tmp_path):
    with pytest.raises(ModelError, match="not a dense model"):
        distil(teachers["sparse"], str(corpus), tmp_path / "run", **OPTIONS)


def test_own_pairs_are_held_out_by_their_documents():
    documents = {f"d{i}": Document("", f"text {i}") for i in range(150)}
    pairs = [Pair(f"question {i}", f"text {i}") for i in range(199)]  # the last 49 are no documents
    pairs += [Pair("another question", "text 0"), Pair("question 3", "text 199")]
    collection, rest = hold_out_pairs(pairs, documents, "pairs.jsonl")
    asked, relevant = set(collection.queries.values()), set().union(*collection.qrels.values())
    assert collection.name == "20 held-out pairs of pairs.jsonl"
    assert len(asked) == 20
    texts = {collection.corpus[id_].text for id_ in relevant}
    assert not any(pair.query in asked or pair.positive in texts for pair in rest)
    assert all(collection.qrels[id_] for id_ in collection.queries)
    assert collection.corpus.keys() > documents.keys()


def test_a_negative_is_of_another_document(tmp_path):
    rows = [
        ("kabel lodan mifil", "kabel lodan mifil rahan", "a"),
        ("pegor", "kabel lodan pegor nufil", "a"),  # has more words of the first query than the next, but is of its document
        ("sojim", "kabel sojim", "b"),
        *((word, word, word) for word in WORDS[60:70]),
    ]
    lines = (json.dumps(dict(zip(("query", "positive", "document_id"), row, strict=True))) for row in rows)
    (tmp_path / EXAMPLES).write_text("\n".join(lines))
    assert add_negatives(tmp_path, 0, False) == len(rows)
    assert add_negatives(tmp_path, 1, False) == 1  # the other queries share no word with another document
    (pair,) = load_pairs(tmp_path / "training.jsonl")
    assert (pair.query, pair.negatives) == ("kabel lodan mifil", ("kabel sojim",))
