import json

import pytest
from sentence_transformers import SparseEncoder

from anysplade import OutputError
from anysplade.cli.demo import demo_parts, run_demo


def test_the_demo_from_end_to_end_and_again(tmp_path):
    """Two steps on one package: everything runs, nothing is learned. The real one is `make demo`."""
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
