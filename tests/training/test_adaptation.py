import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from sentence_transformers import SparseEncoder

from anysplade import (
    Collection,
    DataError,
    ModelError,
    OptionError,
    OutputError,
    Pair,
    adapt,
    evaluate,
    load_collection,
    load_encoder,
    load_pairs,
    make_pairs,
    open_encoder,
)
from anysplade._common.files import only_process
from anysplade.training import adaptation as module
from anysplade.training.judging import Decision, halves
from anysplade.training.level import flops, trim_flops
from tiny import WORDS

OPTIONS = {"steps": 4, "batch_size": 4, "max_length": 32}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents of 24 words, enough to hold some out."""
    generator = random.Random(0)
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = (" ".join(generator.choices(generator.sample(WORDS, 9), k=24)) for _ in range(240))  # words come again
    file.write_text("".join(json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return str(file)


def decided(keep):
    """A ``judge`` that keeps the adapted model, or does not."""
    return lambda _: Decision("better" if keep else "worse", keep, 12, 0.1, (0.05, 0.15), 0.001, True, (2.0, 1.0))


@pytest.mark.parametrize("better", [True, False])
def test_what_is_not_better_is_not_kept(better, corpus, teachers, tmp_path, monkeypatch):
    corpus = str(shutil.copy(corpus, tmp_path / "corpus.jsonl"))
    monkeypatch.setattr(module, "judge", decided(better))
    result = adapt(teachers["sparse"], corpus, tmp_path / "run", teacher=teachers["dense"], **OPTIONS)
    assert result.kept == ("adapted" if better else "original")
    assert result.judged_by == "24 held-out pairs (24 sentence)"  # no document has a title or a heading
    assert result.verdict == result.decision["verdict"] == ("better" if better else "worse")
    assert result.by_kind["sentence"]["queries"] == 12  # the other half decided
    assert result.by_kind["sentence"]["before"] == pytest.approx(result.before["nDCG@10"])
    assert result.comparison["wins"] + result.comparison["ties"] + result.comparison["losses"] == 12
    chosen = tmp_path / "run" / ("adapted" if better else "original")
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == (chosen / "model.safetensors").read_bytes()
    SparseEncoder(result.model)
    assert result.before["nDCG@10"] > 0
    assert {"query_active_dims", "document_active_dims", "flops"} < result.after.keys()
    training = [json.loads(line)["document_id"] for line in (tmp_path / "run" / "training.jsonl").open()]
    assert len(training) == len(set(training)) == result.pairs["sentence"] - 24

    def fail(*_, **__):
        raise AssertionError("done again")

    monkeypatch.setattr(module, "train_as", fail)
    assert adapt(teachers["sparse"], corpus, tmp_path / "run", teacher=teachers["dense"], **OPTIONS) == result
    Path(corpus).write_text("\n".join(Path(corpus).read_text().splitlines()[:-1]))
    with pytest.raises(OutputError, match="not made from the same data"):
        adapt(teachers["sparse"], corpus, tmp_path / "run", teacher=teachers["dense"], **OPTIONS)
    with pytest.raises(OutputError, match="other options"):
        adapt(teachers["sparse"], corpus, tmp_path / "run", teacher=teachers["sparse"], **OPTIONS)


def test_the_adapted_model_costs_no_more_and_reads_as_far(teachers, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "judge", decided(True))
    result = adapt(teachers["sparse"], corpus, tmp_path / "run", teacher=teachers["dense"], **OPTIONS)
    original, adapted = (open_encoder(tmp_path / "run" / name) for name in ("original", "model"))
    assert adapted.max_seq_length == original.max_seq_length == 64
    trained = open_encoder(tmp_path / "run" / "training" / "model")
    assert trained.max_seq_length == 64  # trained on 32
    weights = [dict(encoder.named_parameters()) for encoder in (original, trained, adapted)]
    for name, before in weights[0].items():
        if name != "0.model.cls.predictions.bias":  # it was trimmed
            torch.testing.assert_close(weights[2][name], 0.3 * before + 0.7 * weights[1][name])
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    pairs = load_pairs(tmp_path / "run" / "training.jsonl")
    assert flops(adapted, pairs)[0] > 0
    assert (flops(adapted, pairs) <= flops(original, pairs)).all()
    assert (Path(result.model) / "README.md").read_text().count("How it was made") == 1


def test_the_targets_are_what_the_model_has(teachers):
    encoder = open_encoder(teachers["sparse"])
    assert module._targets(encoder, [Pair("kabel lodan", "kabel mifil nugor"), Pair("kabel", "lodan")]) == (1.5, 2.0)
    assert module._targets(encoder, [Pair("no such word", "none")]) == (1.0, 1.0)  # a target is above 0


def test_trimming_takes_no_more_than_it_must(backbone, corpus, tmp_path):
    encoder = load_encoder(backbone)
    pairs = load_pairs(make_pairs(corpus, tmp_path / "pairs.jsonl") and tmp_path / "pairs.jsonl")
    before = flops(encoder, pairs)
    assert trim_flops(encoder, pairs, before) == 0.0
    assert trim_flops(encoder, pairs, before * [1, 0.9]) > 0  # of everyday queries alone
    assert trim_flops(encoder, pairs, before * [0.8, 1]) > 0
    assert (flops(encoder, pairs) > 0).all()
    assert (flops(encoder, pairs) <= before * [0.8, 1]).all()


def test_a_judged_collection(teachers, corpus, collection_folder, tmp_path, caplog):
    caplog.set_level("INFO", "anysplade")
    judged = str(shutil.copytree(collection_folder, tmp_path / "judged"))
    result = adapt(teachers["sparse"], corpus, tmp_path / "run", teacher=teachers["dense"], judged=judged, **OPTIONS)
    assert "k and shift" not in caplog.text  # adapt has no such options
    assert caplog.text.count("left out") <= 1
    assert result.judged_by == load_collection(judged).name
    collection = load_collection(judged)
    _, reporting = halves(collection, {})
    again = evaluate(result.model, reporting)
    expected = result.after if result.kept == "adapted" else result.before
    assert again.metrics["nDCG@10"] == pytest.approx(expected["nDCG@10"])
    assert (result.decision["queries"], again.queries, result.by_kind) == (10, 10, {})
    record = json.loads((tmp_path / "run" / "adaptation.json").read_text())
    assert record["verdict"] == result.verdict
    del record["verdict"]  # of a version that decided and reported on the same queries
    (tmp_path / "run" / "adaptation.json").write_text(json.dumps(record))
    assert (
        adapt(teachers["sparse"], corpus, tmp_path / "run", teacher=teachers["dense"], judged=judged, **OPTIONS).reason
        == result.reason
    )
    queries = tmp_path / "judged" / "queries.jsonl"
    queries.write_text(queries.read_text().replace(WORDS[3], WORDS[4]))
    with pytest.raises(OutputError, match="changed since it judged the models"):
        adapt(teachers["sparse"], corpus, tmp_path / "run", teacher=teachers["dense"], judged=judged, **OPTIONS)


def test_it_goes_on_where_it_was_stopped(teachers, corpus, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            adapt(teachers["sparse"], corpus, tmp_path / "run", teacher=teachers["dense"], **OPTIONS)
    before = (tmp_path / "run" / "training" / "training.json").stat().st_mtime_ns
    with monkeypatch.context() as patch:  # between the model and the record
        patch.setattr(module, "Adaptation", stop)
        with pytest.raises(KeyboardInterrupt):
            adapt(teachers["sparse"], corpus, tmp_path / "run", teacher=teachers["dense"], **OPTIONS)
    assert (tmp_path / "run" / "model").exists()
    adapt(teachers["sparse"], corpus, tmp_path / "run", teacher=teachers["dense"], **OPTIONS)
    assert (tmp_path / "run" / "training" / "training.json").stat().st_mtime_ns == before


def test_a_damaged_adaptation(teachers, corpus, tmp_path, caplog):
    run, given = tmp_path / "run", {"teacher": teachers["dense"]} | OPTIONS
    first = adapt(teachers["sparse"], corpus, run, **given)
    with only_process(run), pytest.raises(OutputError, match="another process works there now"):
        adapt(teachers["sparse"], corpus, run, **given)
    (run / "options.json").write_text("{")
    assert adapt(teachers["sparse"], corpus, run, **given) == first  # the result says the same
    for name in (
        "model/model.safetensors",
        "original/model.safetensors",
        "adapted/model.safetensors",
        "training/model/config.json",
    ):
        content = (run / name).read_bytes()
        (run / name).unlink()
        (run / name).write_bytes(content[:-10])
    trained_again = adapt(teachers["sparse"], corpus, run, **given)
    assert "model/model.safetensors: is missing or damaged; it is made again" in caplog.text
    assert (trained_again.after, trained_again.before) == (first.after, first.before)


def test_a_mistake_leaves_the_folder_to_the_next_call(teachers, corpus, tmp_path, monkeypatch):
    given = {"teacher": teachers["dense"]} | OPTIONS
    run = tmp_path / "run"
    with pytest.raises(DataError, match="no such corpus"):
        adapt(teachers["sparse"], str(tmp_path / "nowhere.jsonl"), run, **given)
    for wrong in ({"steps": 0}, {"learning_rate": -1.0}, {"kinds": ("titel",)}, {"batch_size": 4096}):
        with pytest.raises(OptionError):
            adapt(teachers["sparse"], corpus, run, **given | wrong)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="without torchrun"):
        adapt(teachers["sparse"], corpus, run, **given)
    assert not run.exists()


def test_faults(teachers, corpus, backbone, tmp_path):
    with pytest.raises(ModelError, match="not trained to retrieve"):
        adapt(backbone, corpus, tmp_path / "a", teacher=teachers["dense"], **OPTIONS)
    with pytest.raises(ModelError, match="cannot teach"):
        adapt(teachers["sparse"], corpus, tmp_path / "b", teacher=teachers["body"], **OPTIONS)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(corpus).read_text().splitlines(keepends=True)[:30]))
    with pytest.raises(DataError, match="30 documents have pairs, too few"):
        adapt(teachers["sparse"], str(few), tmp_path / "c", teacher=teachers["dense"], **OPTIONS)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(OutputError, match="not empty"):
        adapt(teachers["sparse"], corpus, tmp_path / "taken", teacher=teachers["dense"], **OPTIONS)


def test_characters_that_end_lines_elsewhere_than_in_json(corpus, tmp_path):
    """JSON Lines end with \\n alone; a text can hold all of these."""
    rows = [json.loads(line) for line in Path(corpus).read_text().split("\n")[:10]]
    for row in rows:
        row["text"] = row["text"].replace(" ", "\u2028 \u2029 \x85 ", 1)
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    made = make_pairs(str(tmp_path / "corpus.jsonl"), tmp_path / "pairs.jsonl")
    assert "\u2028" in (tmp_path / "pairs.jsonl").read_text()
    module._write_training(str(tmp_path / "corpus.jsonl"), tmp_path, Collection("", {}, {}, {}), ("sentence",), False)
    texts = {row["text"] for row in rows}
    written = load_pairs(tmp_path / "training.jsonl")
    assert len(written) == sum(made.pairs.values())
    assert {pair.positive for pair in written} <= texts
