import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SparseEncoder
from transformers import AutoModelForMaskedLM, AutoTokenizer

from anysplade import (
    CollapseError,
    ModelError,
    OptionError,
    OutputError,
    Pair,
    TrainingConfig,
    evaluate,
    load_encoder,
    train,
    write_collection,
)
from anysplade._common.outputs import digests
from anysplade.cli.training import training_lines
from anysplade.data.collections import load_python_docs
from anysplade.data.pairs import read_parts
from anysplade.errors import AnyspladeError
from anysplade.model.encoder import build_encoder, open_encoder
from anysplade.model.encoding import count_truncated
from anysplade.model.modules import cut_at, reader
from anysplade.model.probe import PROBE_DOCUMENTS, PROBE_QUERIES
from anysplade.model.queries import StaticQueries
from anysplade.training import inputs as run_inputs
from anysplade.training.callbacks import Estimate, last_checkpoint
from anysplade.training.level import active_dims, trim_level
from anysplade.training.run import _ranking_loss
from anysplade.training.trainer import make_trainer, start_encoder
from processes import run_on_two_processes
from tiny import WORDS, make_backbone


@pytest.fixture
def config(backbone, collection_folder, tmp_path):
    def make(**options):
        defaults = {"steps": 8, "batch_size": 4, "checkpoint_steps": 4, "learning_rate": 1e-3, "max_length": 16}
        return TrainingConfig(
            **{"backbone": backbone, "data": str(collection_folder), "output": str(tmp_path / "run")} | defaults | options
        )

    return make


def weights(folder):
    return SparseEncoder(str(folder)).state_dict()


def test_a_model_that_cannot_be_trained_is_said_before_the_data_are_read(tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "modules.json").write_text("[]")
    with pytest.raises(ModelError, match="saved as a SentenceTransformer"):
        train(TrainingConfig(str(tmp_path / "dense"), str(tmp_path / "nowhere.jsonl"), output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_what_a_run_leaves(config, tmp_path):
    result = train(config())
    run = tmp_path / "run"
    assert result.steps == 8
    assert result.resumed_from == 0
    assert result.pairs == 40
    assert result.calibration["shift"] > 0
    assert json.loads((run / "training.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert {"versions", "commit", "hardware", "command"} <= result.provenance.keys()
    checkpoints = sorted((run / "checkpoints").glob("checkpoint-*"))
    assert [c.name for c in checkpoints] == ["checkpoint-4", "checkpoint-8"]
    logged = [entry for entry in result.log if "base_loss" in entry or "loss" in entry]
    assert logged
    ids = torch.arange(8).reshape(1, 8)
    for folder in (run / "model", *checkpoints):  # stock, also in the middle of training
        encoder = SparseEncoder(str(folder))
        assert [type(module).__module__.partition(".")[0] for module in encoder] == ["sentence_transformers"] * 2
        logits = AutoModelForMaskedLM.from_pretrained(folder).eval()(input_ids=ids).logits
        torch.testing.assert_close(logits, encoder[0].model.eval()(input_ids=ids).logits)
        written = load_file(folder / "model.safetensors")
        assert torch.equal(written["cls.predictions.bias"], written["cls.predictions.decoder.bias"])
        assert "cls.predictions.decoder.weight" in written


def test_training_learns_and_the_seed_decides(config, tmp_path):
    runs = [train(config(output=str(tmp_path / name), steps=30, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    losses = [entry["loss"] for entry in runs[0].log if "loss" in entry]
    assert losses[-1] < losses[0]
    a, b, c = (weights(tmp_path / name / "model") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_fused_and_unfused_train_alike(config, tmp_path):
    for name, fused in (("a", True), ("b", False)):
        train(config(output=str(tmp_path / name), fused=fused))
    a, b = (weights(tmp_path / name / "model") for name in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-3)


def test_a_finished_run_is_not_run_again(config, tmp_path):
    """Nor one of a version that lacked an option, which had its default."""
    first = train(config())
    for name in ("run.json", "training.json"):
        record = json.loads((tmp_path / "run" / name).read_bytes())
        del record["config"]["own_words"]
        (tmp_path / "run" / name).write_text(json.dumps(record))
    written = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    assert train(config()).log == first.log
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == written


def test_other_options_in_the_same_folder_are_refused(config):
    train(config())
    with pytest.raises(OutputError, match=r"other options \(seed 0, now 1\)"):
        train(config(seed=1))


def test_a_foreign_folder_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        train(config())
    assert (tmp_path / "run" / "thesis.tex").exists()


@pytest.fixture
def inputs(collection_folder, backbone, tmp_path):
    """Copies of all that a run reads: options that name them."""
    shutil.copytree(collection_folder, tmp_path / "collection")
    shutil.copytree(backbone, tmp_path / "backbone")
    ids = [{"query_id": f"q{i}", "positive_id": f"d{i}"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ids))
    return {
        "data": str(tmp_path / "pairs.jsonl"),
        "texts": str(tmp_path / "collection"),
        "dev": str(tmp_path / "collection"),
        "dev_split": "test",
        "backbone": str(tmp_path / "backbone"),
    }


CHANGES = {
    "pairs.jsonl": ('{"query_id": "q0", "positive_id": "d1"}\n', "the training data changed since this run began (DATA)"),
    "collection/corpus.jsonl": ('{"_id": "new", "text": "kabel"}\n', "the dev collection changed since this run began (DEV)"),
    "collection/qrels/test.tsv": ("q0\td1\t1\n", "the dev collection changed since this run began (DEV)"),
    "backbone/config.json": (" ", "the backbone changed since this run began (BACKBONE)"),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("file", CHANGES)
def test_what_changed_under_a_run_is_refused(file, finished, config, inputs, tmp_path):
    train(config(**inputs))
    if not finished:
        (tmp_path / "run" / "training.json").unlink()
    more, message = CHANGES[file]
    with open(tmp_path / file, "a") as opened:
        opened.write(more)
    for name in ("data", "dev", "backbone"):
        message = message.replace(f"({name.upper()})", f"({inputs[name]})")
    with pytest.raises(OutputError, match=re.escape(f"{tmp_path / 'run'}: {message}; choose another `output`")):
        train(config(**inputs))
    assert (tmp_path / "run" / "data").exists() != finished
    assert (tmp_path / "run" / "model").exists()


def _count_reads(monkeypatch):
    """A list that grows whenever a run reads its data."""
    reads = []
    monkeypatch.setattr(run_inputs, "read_parts", lambda *args, **kwargs: reads.append(args) or read_parts(*args, **kwargs))
    return reads


def test_a_finished_run_reads_again_only_what_may_have_changed(config, inputs, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "anysplade")
    first = train(config(**inputs))

    def again():
        caplog.clear()
        assert train(config(**inputs)) == first
        assert "already has this run's result" in caplog.text
        assert not (tmp_path / "run" / "data").exists()
        read, reads[:] = bool(reads), []
        return read

    reads = _count_reads(monkeypatch)
    assert not again()
    os.utime(inputs["data"], (1, 1))
    assert again()
    assert not again()
    (tmp_path / "collection" / "corpus.jsonl").touch()
    assert again()
    assert not again()


def test_a_run_inside_its_data_and_one_of_an_earlier_version(config, inputs, tmp_path, monkeypatch):
    options = inputs | {"data": str(tmp_path / "collection"), "texts": None, "output": str(tmp_path / "collection" / "run")}
    train(config(**options))
    reads = _count_reads(monkeypatch)
    train(config(**options))
    assert not reads
    record = tmp_path / "collection" / "run" / "run.json"
    run = json.loads(record.read_text())
    record.write_text(json.dumps({"config": run["config"], "data_hash": run["hashes"]["data"]}))
    train(config(**options))
    assert len(reads) == 1
    train(config(**options))
    assert len(reads) == 1


@pytest.mark.parametrize(
    "options",
    [
        *({"steps": 0}, {"batch_size": 1}, {"learning_rate": float("nan")}, {"epochs": -1}),
        *(
            {"steps": 2.5},
            {"negatives": 0.4},
            {"seed": "7"},
            {"batch_size": True},
            {"checkpoint_steps": float("inf")},
            {"seed": -1},
            {"seed": 2**32},
        ),
        *({"learning_rate": "1e-3"}, {"learning_rate": True}, {"k": "automatic"}, {"mute": "yes"}, {"mute": 1}),
        *({"precision": "float16"}, {"fold": None}, {"query_prompt": 7}, {"dev": ["a"]}, {"report_to": [1]}),
    ],
)
def test_impossible_options(config, options):
    with pytest.raises(OptionError, match=f"{next(iter(options))} is"):
        config(**options)


def test_the_same_value_of_another_type(config, tmp_path):
    same = config(batch_size=4.0, steps=np.int64(8), learning_rate=np.float32(0.5), report_to="none", output=tmp_path / "run")
    assert same == config(learning_rate=0.5, report_to=("none",))
    assert [type(value) for value in (same.batch_size, same.steps, same.learning_rate, same.output)] == [int, int, float, str]


@pytest.mark.parametrize(
    "name, message",
    [("tensorbord", "tensorboard, trackio, wandb"), ("mlflow", "pip install mlflow"), ("wandb", "pip install wandb")],
)
def test_a_tracker_that_cannot_be_used_is_said_before_any_work(name, message, config, tmp_path):
    with pytest.raises(OptionError, match=f"`report_to={name}`: .*{message}"):
        train(config(report_to=(name,), data=str(tmp_path / "nowhere")))
    assert not (tmp_path / "run").exists()


def test_one_pair_is_too_few(config, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"query": "kabel", "positive": "lodan"}\n')
    with pytest.raises(OptionError, match="too few"):
        train(config(data=str(tmp_path / "one.jsonl")))


@pytest.fixture
def repeated(tmp_path):
    """200 queries with 5 documents."""
    rows = [{"query": f"kabel {WORDS[i % 140]} {WORDS[i // 2]}", "positive": f"lodan {WORDS[i % 5]}"} for i in range(200)]
    (tmp_path / "repeated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "repeated.jsonl")


def test_a_batch_that_cannot_be_filled(config, repeated, tmp_path):
    with pytest.raises(OptionError, match=r"repeated.jsonl: a batch needs 8 .* 5 distinct positives give 5; use `batch_size=5`"):
        train(config(data=repeated, batch_size=8))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, steps", [({"steps": 50}, 50), ({"steps": None, "epochs": 1.25}, 50), ({"steps": 50, "batch_size": 4}, 50)]
)
def test_as_many_steps_as_asked_for_on_few_documents(options, steps, config, repeated):
    result = train(config(data=repeated, **{"batch_size": 5, "checkpoint_steps": 100} | options))
    assert result.steps == len(result.monitoring["observations"]) == steps


def test_batches_that_run_out_are_an_error(config, monkeypatch, tmp_path):
    monkeypatch.setattr("anysplade.training.batches.DistinctBatches.__iter__", lambda self: iter(()))
    with pytest.raises(AnyspladeError, match="ended at step 0 of 8"):
        train(config())
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow  # two processes once more; test_two_processes_train_as_one has the usual case
def test_two_processes_on_few_documents(backbone, repeated, tmp_path):
    options = {
        "backbone": backbone,
        "data": repeated,
        "steps": 60,
        "batch_size": 4,
        "max_length": 16,
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "options.json").write_text(json.dumps([options]))
    run_on_two_processes("two_trainings.py", tmp_path / "options.json", tmp_path / "meeting")
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 60
    (tmp_path / "options.json").write_text(json.dumps([options | {"batch_size": 8, "output": str(tmp_path / "other")}]))
    with pytest.raises(AssertionError, match="give 5; use `batch_size=4`") as refused:
        run_on_two_processes("two_trainings.py", tmp_path / "options.json", tmp_path / "second-meeting")
    assert "the first process could not prepare the examples" in str(refused.value)


def test_hard_negatives(config, tmp_path):
    lines = [
        {"query": f"kabel {w}", "positive": f"lodan {w}", "negative": f"mifil {w}"} for w in ("nugor", "pehan", "rajim", "sobel")
    ]
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train(config(data=str(tmp_path / "n.jsonl"), steps=2)).steps == 2


def test_the_monitor_and_the_logs_are_in_the_result(config):
    result = train(config(steps=12))
    observations = result.monitoring["observations"]
    assert [seen["step"] for seen in observations] == list(range(12))
    assert all(seen["document_active_dims"] > 0 for seen in observations)
    assert observations[9]["gradient_norm"] > 0


@pytest.mark.parametrize("regularizer", ["df-flops", "l1"])
def test_the_other_regularizers(config, regularizer):
    assert train(config(steps=3, regularizer=regularizer)).steps == 3


@pytest.fixture
def sentences(tmp_path):
    """Pairs of real sentences, for the bundled backbones."""
    pairs = [{"query": q, "positive": d} for q, d in zip(PROBE_QUERIES, PROBE_DOCUMENTS, strict=True)]
    (tmp_path / "sentences.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(tmp_path / "sentences.jsonl")


@pytest.fixture
def collapsing(config, sentences):
    """Logits twenty times too large: the softmax over the batch is saturated from the first step on."""

    def make(**options):
        return config(backbone="bert-tiny", data=sentences, k=0.05, shift=0, steps=25, batch_size=8, **options)

    return make


def test_active_dims_as_a_target(config, tmp_path):
    """No weight to tune. A short run: the margin is wide, the experiments in benchmarks/ have the narrow one."""
    write_collection(tmp_path / "docs", *load_python_docs(["networkx"]))
    options = {"steps": 60, "batch_size": 16, "backbone": "bert-tiny", "data": str(tmp_path / "docs"), "max_length": 48}
    result = train(config(query_active_dims=10, document_active_dims=30, checkpoint_steps=1000, **options))
    assert result.query_active_dims == pytest.approx(10, rel=0.25)
    assert result.document_active_dims == pytest.approx(30, rel=0.25)
    assert result.max_seq_length == 256  # these are the active dims of documents of which training reads a fifth


@pytest.mark.parametrize("change", [0.8, 1.25])
def test_the_level_corrects_what_the_weights_left(change):
    encoder = load_encoder("bert-tiny", max_length=32)
    pairs = [Pair(q, d) for q, d in zip(PROBE_QUERIES, PROBE_DOCUMENTS, strict=True)]
    queries, documents = active_dims(encoder, pairs)
    shift = trim_level(encoder, pairs, (None, change * documents))
    assert (shift > 0) == (change < 1)
    assert active_dims(encoder, pairs)[1] == pytest.approx(change * documents, rel=0.02)
    assert trim_level(encoder, pairs, (None, None)) == 0
    both = active_dims(encoder, pairs)
    trim_level(encoder, pairs, (queries, documents))
    after = active_dims(encoder, pairs)
    assert max(abs(after[0] / queries - 1), abs(after[1] / documents - 1)) < max(
        abs(both[0] / queries - 1), abs(both[1] / documents - 1)
    )


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("double_log", [False, True])
def test_the_level_is_corrected_for_every_activation(pooling, double_log):
    encoder = build_encoder("bert-tiny", max_length=32, pooling=pooling, double_log=double_log)[0]
    pairs = [Pair(q, d) for q, d in zip(PROBE_QUERIES, PROBE_DOCUMENTS, strict=True)][:16]
    start = active_dims(encoder, pairs)
    for targets in ((None, 0.9 * start[1]), start):
        trim_level(encoder, pairs, targets)
        after = active_dims(encoder, pairs)
        assert all(target is None or n == pytest.approx(target, rel=0.02) for n, target in zip(after, targets, strict=True))


def test_two_targets_share_the_error():
    """More of queries and fewer of documents, which no shift gives: both end equally far from what is wanted."""
    encoder = load_encoder("bert-tiny", max_length=32)
    pairs = [Pair(q, d) for q, d in zip(PROBE_QUERIES, PROBE_DOCUMENTS, strict=True)]
    queries, documents = active_dims(encoder, pairs)
    targets = 1.3 * queries, 0.9 * documents
    trim_level(encoder, pairs, targets)
    few, many = (n / target for n, target in zip(active_dims(encoder, pairs), targets, strict=True))
    assert few < 1 < many
    assert few * many == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "limits, trained, reads",
    [
        ({}, 16, 64),  # what its tokenizer allows
        ({"model_max_length": 1000}, 16, 512),  # of 600 positions
        ({"model_max_length": None}, 256, 512),
        ({"model_max_length": 1000}, 600, 600),
        ({"model_max_length": 1000}, None, 600),
        ({"model_max_length": 20}, 32, 32),
    ],
)
def test_the_length_of_the_training_is_no_limit_of_the_model(limits, trained, reads, config, tmp_path):
    folder = make_backbone("bert", tmp_path / "long", max_position_embeddings=600)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = limits.get("model_max_length", tokenizer.model_max_length)
    tokenizer.save_pretrained(folder)
    long = Pair("river flood", " ".join(["kabel"] * 700))
    result = train(config(backbone=folder, max_length=trained, steps=1, checkpoint_steps=1))
    assert result.max_seq_length == SparseEncoder(result.model).max_seq_length == reads
    assert AutoTokenizer.from_pretrained(result.model).model_max_length == reads
    assert SparseEncoder(result.model).preprocess([long.positive])["input_ids"].shape == (1, reads)
    assert any(f"reads {reads} tokens" in line for line in training_lines(result))
    checkpoint = SparseEncoder(str(tmp_path / "run" / "checkpoints" / "checkpoint-1"))
    assert checkpoint.max_seq_length == (trained or 600)


@pytest.mark.parametrize("own, reads", [(8, 16), (40, 40), (600, 600)])
@pytest.mark.parametrize("queries", ["mlm", "idf"])
def test_a_sparse_encoder_reads_as_far_as_before(own, reads, queries, config, tmp_path):
    backbone = make_backbone("bert", tmp_path / "long", max_position_embeddings=600)
    encoder = build_encoder(backbone, 1, 0, query_encoder=queries, idf_texts=["kabel"])[0]
    encoder.prompts["query"] = "kabel "
    cut_at(encoder, own)
    encoder.save_pretrained(str(tmp_path / "saved"))
    result = train(config(backbone=str(tmp_path / "saved"), steps=1))
    trained = open_encoder(result.model)
    assert result.max_seq_length == reader(trained, "document").max_seq_length == reads
    assert count_truncated(trained, ["kabel " * 700], "query").limit == (reads if queries == "mlm" else own)
    assert trained.prompts["query"] == "kabel "


@pytest.mark.parametrize("queries", ["idf", "static"])
def test_queries_by_token_are_read_as_far_as_documents(queries, config, tmp_path):
    result = train(config(query_encoder=queries, steps=1))
    trained = open_encoder(result.model)
    assert SparseEncoder(result.model).max_seq_length == 64
    assert {count_truncated(trained, ["kabel " * 700], role).limit for role in ("query", "document")} == {64}
    assert StaticQueries.open(result.model).count_truncated(["kabel " * 700]).limit == 64


def test_the_finished_model_is_measured_at_the_length_that_an_index_reads(config, collection_folder, tmp_path):
    rows = [{"query": word, "positive": " ".join(np.roll(WORDS, i)[:40])} for i, word in enumerate(WORDS)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data": str(tmp_path / "long.jsonl"), "max_length": 10, "dev": str(collection_folder), "dev_split": "test"}
    result = train(config(**options))
    trained = open_encoder(result.model)
    found = active_dims(trained, [Pair(row["query"], row["positive"]) for row in rows])
    assert found == (result.query_active_dims, result.document_active_dims)
    assert result.dev["cut"]["document"]["max_length"] == 64
    assert result.dev["nDCG@10"] == pytest.approx(evaluate(trained, str(collection_folder)).metrics["nDCG@10"])


def test_a_target_that_is_missed_is_said(config, caplog):
    train(config(document_active_dims=149, steps=2))
    assert "document active dims, the target was 149" in caplog.text


def test_a_collapse_is_named_and_training_goes_on(collapsing, caplog):
    result = train(collapsing())
    assert any(finding["collapse"] for finding in result.monitoring["findings"])
    assert result.monitoring["findings"][0]["step"] <= 20
    assert result.steps == 25
    assert result.monitoring["findings"][0]["evidence"] in caplog.text


def test_stop_on_collapse(collapsing, tmp_path):
    with pytest.raises(CollapseError, match=r"the training collapsed: .* at step"):
        train(collapsing(on_collapse="stop"))
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(CollapseError, match="collapsed before"):
        train(collapsing(on_collapse="stop"))


def test_recalibrate_on_collapse(collapsing, monkeypatch):
    trainers = []

    def new_encoder(*arguments):
        assert not any(trainer() for trainer in trainers)  # or two models and their optimizers would be in memory
        return start_encoder(*arguments)

    def new_trainer(*arguments):
        trainer, monitor = make_trainer(*arguments)
        trainers.append(weakref.ref(trainer))
        return trainer, monitor

    monkeypatch.setattr("anysplade.training.run.start_encoder", new_encoder)
    monkeypatch.setattr("anysplade.training.run.make_trainer", new_trainer)
    result = train(collapsing(on_collapse="recalibrate"))
    assert len(trainers) > 1
    assert [restart["k"] for restart in result.restarts][:1] == [0.05]
    assert any(finding["collapse"] for finding in result.restarts[0]["findings"])
    assert result.calibration["k"] != 0.05
    assert not any(finding["collapse"] for finding in result.monitoring["findings"])
    assert result.steps == 25


def test_a_torn_checkpoint_is_removed(tmp_path):
    for step, complete in ((5, True), (10, True), (15, False)):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text("{}")
        if complete:
            (checkpoint / "complete").write_text(json.dumps(digests(checkpoint)))
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    assert not (tmp_path / "checkpoint-15").exists()


KILLED = {
    "steps": 60,
    "checkpoint_steps": 7,
    "regularizer": "df-flops",
    "document_active_dims": 40.0,
    "gradient_accumulation": 2,
    "k": 2.0,
    "shift": 0.5,
}


@pytest.mark.slow  # half a minute and more; test_callbacks has what damage does, without chance
@pytest.mark.parametrize("wanted", [3, 10])
def test_killed_at_random_moments(config, tmp_path, wanted):
    """Each time the run goes on from its last checkpoint, and it ends with the very weights of the uninterrupted one."""
    whole = train(config(output=str(tmp_path / "whole"), **KILLED))
    context = multiprocessing.get_context("forkserver")  # the libraries are loaded once, so that a start takes no time
    context.set_forkserver_preload(["anysplade.training.run"])
    generator = random.Random(int(time.time()))
    kills = 0
    deadline = time.monotonic() + 200
    while kills < wanted and time.monotonic() < deadline:
        run = tmp_path / f"run-{kills % 3}"  # three runs, killed in turns
        process = context.Process(target=train, args=(config(output=str(run), **KILLED),))
        process.start()
        # From the first step on, at a random moment: in a step, between two, or in the writing of a checkpoint.
        until(lambda run=run: (run / "run.json").exists(), process)
        process.join(generator.uniform(0, 2))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills == wanted
    resumed = []
    for i in range(3):
        result = train(config(output=str(tmp_path / f"run-{i}"), **KILLED))
        resumed.append(result.resumed_from)
        a, b = weights(tmp_path / "whole" / "model"), weights(tmp_path / f"run-{i}" / "model")
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert result.monitoring["observations"] == whole.monitoring["observations"]
    assert max(resumed) > 0 or wanted < 10


def until(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline and process.exitcode is None:
        time.sleep(0.01)


@pytest.mark.slow  # the call is killed above; this is the same by the command
def test_the_command_goes_on_where_it_was_killed(config, tmp_path):
    options = config(steps=100, checkpoint_steps=20)
    command = [sys.executable, "-m", "anysplade", "train", options.backbone, options.data, "--out", options.output, "--json"]
    command += ["--steps", "100", "--batch-size", "4", "--checkpoint-steps", "20", "--learning-rate", "1e-3", "--max-length", "16"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("*/complete")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run" / "training.json").exists()
    again = subprocess.run(command, capture_output=True, check=True, text=True)
    result = json.loads(again.stdout)
    assert result["resumed_from"] >= 20
    assert result["steps"] == 100
    assert "batch_size 4" in again.stderr  # what it was asked for


def test_two_processes_train_as_one(collection_folder, teachers, tmp_path):
    """With DF-FLOPS, which has all to gather that FLOPS has, and more; and with a teacher, which scores the documents of both."""
    # Without dropout, which is random in another way in each process.
    backbone = make_backbone("bert", tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    options = {
        "backbone": backbone, "data": str(collection_folder), "batch_size": 8, "learning_rate": 1e-4,
        "max_length": 16, "k": 2.0, "shift": 0.5, "checkpoint_steps": 100,
    }  # fmt: skip
    wide = {"steps": 40, "regularizer": "df-flops", "document_active_dims": 40.0, "query_regularizer_weight": 0.01}
    both = (options | wide, options | {"steps": 20, "teacher": teachers["dense"], "negatives": 0})
    first, taught = (train(TrainingConfig(output=str(tmp_path / f"one-{i}"), **config)) for i, config in enumerate(both))
    of_two = [config | {"output": str(tmp_path / f"two-{i}")} for i, config in enumerate(both)]
    (tmp_path / "options.json").write_text(json.dumps(of_two))
    run_on_two_processes("two_trainings.py", tmp_path / "options.json", tmp_path / "meeting")
    two, two_taught = (json.loads((tmp_path / f"two-{i}" / "training.json").read_text()) for i in range(2))
    assert (first.processes, two["processes"], two_taught["processes"]) == (1, 2, 2)
    a, b = first.monitoring["observations"], two["monitoring"]["observations"]
    assert len(a) == len(b) == 40
    for name, margin in (("loss", 1e-4), ("score_mean", 1e-3), ("query_active_dims", 0.02), ("document_active_dims", 0.02)):
        assert [seen[name] for seen in b] == pytest.approx([seen[name] for seen in a], rel=margin, abs=margin), name
    for name in ("query_active_dims", "document_active_dims"):
        assert two[name] == pytest.approx(getattr(first, name), rel=0.02)
    a, b = ([seen["loss"] for seen in found["observations"]] for found in (taught.monitoring, two_taught["monitoring"]))
    assert b == pytest.approx(a, rel=1e-4)


def test_a_batch_that_does_not_divide_among_the_processes(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(OptionError, match="batch_size 4 does not divide among 3 processes"):
        train(config())


def test_the_best_checkpoint_on_the_dev_collection_is_kept(config, collection_folder, tmp_path):
    """A learning rate that ruins the model: what is kept is from before, and training ends early."""
    options = {"dev": str(collection_folder), "dev_split": "test", "patience": 2, "checkpoint_steps": 3}
    result = train(config(steps=60, learning_rate=0.05, **options))
    scores = {entry["step"]: entry["eval_dev_nDCG@10"] for entry in result.log if "eval_dev_nDCG@10" in entry}
    assert result.best_step == max(scores, key=scores.get)
    assert result.steps == result.best_step + 2 * 3
    assert result.dev["nDCG@10"] == pytest.approx(scores[result.best_step])
    assert result.dev["document_active_dims"] > 0
    again = evaluate(str(tmp_path / "run" / "model"), str(collection_folder))
    assert again.metrics["nDCG@10"] == pytest.approx(result.dev["nDCG@10"])


def test_a_long_run_is_estimated(config, caplog, monkeypatch):
    monkeypatch.setattr("anysplade.training.callbacks._LONG", 0)
    caplog.set_level("INFO")
    train(config(steps=8))
    for left in (3, 2, 1):  # after five steps, and at each tenth of the run
        assert f"s per step: about 1 second for the remaining {left} step{'' if left == 1 else 's'}" in caplog.text


def test_an_estimate_counts_what_later_steps_take(caplog, monkeypatch):
    """Five quick steps and slow ones after them: the first estimate knows only the quick ones, the next ones all."""
    caplog.set_level("INFO", "anysplade")
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr("anysplade.training.callbacks.time", SimpleNamespace(perf_counter=lambda: clock.now))
    estimate, arguments = Estimate(), SimpleNamespace(world_size=1)
    estimate.on_train_begin(arguments, SimpleNamespace(global_step=0), None)
    for step in range(1, 101):
        clock.now += 1 if step <= 5 else 5
        estimate.on_step_end(arguments, SimpleNamespace(global_step=step, max_steps=100), None)
    said = [message.partition(",")[0] for message in caplog.messages]
    assert said[:2] == [
        "1 s per step: about 2 minutes for the remaining 95 steps",
        "3.2 s per step: about 5 minutes for the remaining 90 steps",  # 4 steps of 1 s and 5 of 5 s
    ]
    assert len(said) == 9  # the last ten steps take less than a minute


def test_the_ranking_loss_is_reported_without_the_regularizer(config):
    result = train(config(steps=40, query_regularizer_weight=0.03, document_regularizer_weight=0.03))
    by_step = {entry["step"]: entry for entry in result.log if "loss" in entry}
    assert by_step[40]["loss"] > 1.01 * by_step[40]["base_loss"]
    first, last = result.ranking_loss["first"], result.ranking_loss["last"]
    assert (first["from_step"], first["to_step"], last["from_step"], last["to_step"]) == (1, 10, 31, 40)
    assert first["mean"] == pytest.approx((by_step[1]["base_loss"] + 9 * by_step[10]["base_loss"]) / 10)
    assert last["mean"] == by_step[40]["base_loss"]
    seen = [observation["loss"] for observation in result.monitoring["observations"]]
    assert first["mean"] == pytest.approx(sum(seen[:10]) / 10, rel=1e-3)
    line = f"; ranking loss {first['mean']:.3g} over steps 1-10, {last['mean']:.3g} over steps 31-40 (guessing: 1.39)"  # log 4
    assert training_lines(result)[0].endswith(line)
    assert _ranking_loss([]) is None
    parts = {"loss": 9.0, "kl_loss": 1.0, "margin-mse_loss": 2.0, "document_regularizer_loss": 6.0, "step": 1}
    assert _ranking_loss([parts])["last"] == {"from_step": 1, "to_step": 1, "mean": 3.0}


def test_the_card_says_how_the_model_was_made(config, collection_folder, tmp_path, drawn_cards):
    train(config(dev=str(collection_folder), dev_split="test"))
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert card.index("## Usage") < card.index("## How it was made") < card.index("## Training Details")
    assert "Calibration of the MLM head | logits / " in card
    assert "On the dev collection `tiny` (20 queries, 40 documents" in card
    assert "steps: 8\n" in card
    assert (tmp_path / "run" / "model" / "training.svg").read_text().startswith("<?xml")
