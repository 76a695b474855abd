import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from sentence_transformers import SparseEncoder
from transformers import AutoModelForMaskedLM

from anysplade import CollapseError, OptionError, OutputError, Pair, TrainingConfig, load_encoder, train, write_collection
from anysplade.datasets import load_python_docs
from anysplade.probe import PROBE_DOCUMENTS, PROBE_QUERIES
from anysplade.training import _active_dims, _last_checkpoint, _trim_level


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
    first = train(config())
    written = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    assert train(config()) == first
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == written


def test_other_options_in_the_same_folder_are_refused(config):
    train(config())
    with pytest.raises(OutputError, match=r"other options \(seed 0, now 1\)"):
        train(config(seed=1))


def test_a_foreign_folder_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="no run of anysplade"):
        train(config())
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_data_that_changed_under_a_run_is_refused(config, tmp_path, collection_folder):
    data = tmp_path / "pairs.jsonl"
    data.write_text((collection_folder / "pairs.jsonl").read_text())
    train(config(data=str(data)))
    (tmp_path / "run" / "training.json").unlink()
    with open(data, "a") as file:
        file.write('{"query": "kabel", "positive": "lodan"}\n')
    with pytest.raises(OutputError, match="training data changed"):
        train(config(data=str(data)))


@pytest.mark.parametrize("options", [{"steps": 0}, {"batch_size": 1}, {"learning_rate": float("nan")}, {"epochs": -1}])
def test_impossible_options(config, options):
    with pytest.raises(OptionError, match=f"{next(iter(options))} is"):
        config(**options)


def test_one_pair_is_too_few(config, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"query": "kabel", "positive": "lodan"}\n')
    with pytest.raises(OptionError, match="too few"):
        train(config(data=str(tmp_path / "one.jsonl")))


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


@pytest.mark.parametrize("change", [0.8, 1.25])
def test_the_level_corrects_what_the_weights_left(change):
    encoder = load_encoder("bert-tiny", max_length=32)
    pairs = [Pair(q, d) for q, d in zip(PROBE_QUERIES, PROBE_DOCUMENTS, strict=True)]
    queries, documents = _active_dims(encoder, pairs)
    shift = _trim_level(encoder, pairs, (None, change * documents))
    assert (shift > 0) == (change < 1)
    assert _active_dims(encoder, pairs)[1] == pytest.approx(change * documents, rel=0.02)
    assert _trim_level(encoder, pairs, (None, None)) == 0
    both = _active_dims(encoder, pairs)
    _trim_level(encoder, pairs, (queries, documents))
    after = _active_dims(encoder, pairs)
    assert max(abs(after[0] / queries - 1), abs(after[1] / documents - 1)) < max(
        abs(both[0] / queries - 1), abs(both[1] / documents - 1)
    )


def test_a_target_that_is_missed_is_said(config, caplog):
    train(config(document_active_dims=149, steps=2))
    assert "document active dims, the target was 149" in caplog.text


def test_a_collapse_is_named_and_training_goes_on(collapsing, caplog):
    result = train(collapsing())
    assert any(finding["collapse"] for finding in result.monitoring["findings"])
    assert result.monitoring["findings"][0]["step"] <= 20
    assert result.steps == 25
    assert result.monitoring["findings"][0]["mend"] in caplog.text


def test_stop_on_collapse(collapsing, tmp_path):
    with pytest.raises(CollapseError, match=r"the training collapsed: .* at step"):
        train(collapsing(on_collapse="stop"))
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(CollapseError, match="collapsed before"):
        train(collapsing(on_collapse="stop"))


def test_recalibrate_on_collapse(collapsing):
    result = train(collapsing(on_collapse="recalibrate"))
    assert [restart["k"] for restart in result.restarts][:1] == [0.05]
    assert result.restarts[0]["findings"][0]["collapse"]
    assert result.calibration["k"] != 0.05
    assert not any(finding["collapse"] for finding in result.monitoring["findings"])
    assert result.steps == 25


def test_a_torn_checkpoint_is_removed(tmp_path):
    for step, complete in ((5, True), (10, True), (15, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert _last_checkpoint(tmp_path).name == "checkpoint-10"
    assert not (tmp_path / "checkpoint-15").exists()


def test_killed_and_started_again(config, tmp_path):
    """The command is killed after its first checkpoint; the same command goes on from there and ends as if nothing was."""
    options = {"steps": 100, "checkpoint_steps": 20, "regularizer": "df-flops", "document_active_dims": 40.0}
    whole = train(config(output=str(tmp_path / "whole"), **options))
    killed = config(**options)
    command = [sys.executable, "-m", "anysplade.cli", "train", killed.backbone, killed.data, "--out", killed.output, "--json"]
    command += ["--steps", "100", "--batch-size", "4", "--checkpoint-steps", "20", "--learning-rate", "1e-3", "--max-length", "16"]
    command += ["--regularizer", "df-flops", "--document-active-dims", "40"]
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
    assert result["steps"] == whole.steps == 100
    a, b = weights(tmp_path / "whole" / "model"), weights(tmp_path / "run" / "model")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_several_processes_are_refused(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="without torchrun"):
        train(config())
