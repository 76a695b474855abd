import json
from itertools import islice

import pytest
from sentence_transformers import SparseEncoder

from anysplade import Collection, OutputError
from anysplade.cli.demo import demo_parts, run_demo
from anysplade.data.collections import load_python_docs


@pytest.fixture
def few_docs(monkeypatch):
    """The first documents of a package, with their queries, and the first training pairs."""

    def load(packages, progress):
        collection, pairs = load_python_docs(packages)
        corpus = dict(islice(collection.corpus.items(), 120))
        qrels = {query: found for query, found in collection.qrels.items() if found.keys() <= corpus.keys()}
        queries = {query: collection.queries[query] for query in qrels}
        return Collection(collection.name, corpus, queries, qrels), pairs[:64]

    monkeypatch.setattr("anysplade.cli.demo.load_python_docs", load)


def test_the_demo_from_end_to_end_and_again(tmp_path, few_docs):
    """Two steps on a part of a package: everything runs, nothing is learned. The real one is `make demo`."""
    first = run_demo(tmp_path / "demo", steps=2, packages=("networkx",))
    names = [(row["backbone"], row["calibration"]) for row in first.rows]
    assert names == [(b, c) for b in ("bert-tiny", "modernbert-tiny") for c in ("none", "scale", "auto")] + [("bm25", None)]
    for row in first.rows[:-1]:
        assert {"k", "shift", "RR@10", "nDCG@10", "query_active_dims", "document_active_dims", "flops"} <= row.keys()
        assert (row["k"] == 1) == (row["calibration"] == "none") or row["calibration"] == "auto"
        assert (row["shift"] == 0) == (row["calibration"] != "auto")
    assert first.rows[-1]["RR@10"] > 0.5
    assert len(first.searches) == 3
    for _, hits in first.searches:
        assert hits
        assert sum(term.product for term in hits[0].terms) == pytest.approx(hits[0].score)
    SparseEncoder(first.model)
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["rows"] == first.rows
    assert demo_parts(first)

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*.safetensors")}
    again = run_demo(tmp_path / "demo", steps=2, packages=("networkx",))
    assert again.rows[:-1] == first.rows[:-1]
    assert again.searches == first.searches
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*.safetensors")} == written
    with pytest.raises(OutputError, match="other options"):
        run_demo(tmp_path / "demo", steps=3, packages=("networkx",))


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        run_demo(tmp_path)
