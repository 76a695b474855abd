"""With published weights, which the project does not contain: folders of a dense model and of a SPLADE, named in the environment.

ANYSPLADE_DENSE=all-MiniLM-L6-v2 ANYSPLADE_SPLADE=splade pytest -m models
"""

import os

import pytest

from anysplade import TrainingConfig, adapt, encode, evaluate, load_encoder, open_encoder, train, train_head
from anysplade.model.modules import term_names
from anysplade.training.teachers import open_teacher

pytestmark = [pytest.mark.models, pytest.mark.slow]


def folder(name):
    if name not in os.environ:
        pytest.skip(f"{name} names no folder")
    return os.environ[name]


def test_a_dense_model_becomes_a_sparse_one_and_teaches_it(tmp_path):
    dense = folder("ANYSPLADE_DENSE")
    train_head(dense, "python-docs", tmp_path / "backbone", steps=60)
    options = {"steps": 20, "batch_size": 8, "max_length": 48, "learning_rate": 1e-4, "teacher": dense}
    train(TrainingConfig(str(tmp_path / "backbone"), "python-docs", output=str(tmp_path / "run"), **options))
    start = evaluate(load_encoder(str(tmp_path / "backbone"), 1, 0), "python-docs")
    trained = evaluate(str(tmp_path / "run"), "python-docs")
    assert trained.metrics["nDCG@10"] > max(0.3, start.metrics["nDCG@10"])
    assert trained.document_active_dims < 500


def test_a_published_splade_teaches_and_is_adapted(tmp_path):
    splade = folder("ANYSPLADE_SPLADE")
    assert open_teacher(splade).kind == "sparse"
    encoder = open_encoder(splade)
    terms = encode(encoder, ["how to invert a matrix"], "query")
    assert {"matrix", "invert"} & {term_names(encoder)[term] for term in terms.indices}
    options = {"steps": 10, "batch_size": 8, "max_length": 48, "judged": "python-docs"}
    result = adapt(splade, "python-docs", tmp_path / "run", teacher=folder("ANYSPLADE_DENSE"), **options)
    assert min(evaluate(result.model, "python-docs").metrics["nDCG@10"], result.before["nDCG@10"]) > 0.2
    assert (result.kept == "adapted") == result.decision["keep"]
    assert result.verdict in ("better", "cheaper and not worse", "no difference shown", "worse")
