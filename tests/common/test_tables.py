from dataclasses import dataclass

import pytest

import anysplade
from anysplade import Collection, Document, Hit, Hits
from anysplade._common.tables import Tabular
from anysplade.evaluation.evaluations import evaluate
from anysplade.evaluation.grid import Evaluations


@dataclass(frozen=True, repr=False)
class Numbers(Tabular):
    name: str
    share: float
    nothing: None
    many: list[int]

    def to_dict(self):
        return vars(self)


def test_a_result_is_a_row_of_its_plain_values():
    result = Numbers("a", 0.123456, None, list(range(1000)))
    assert repr(result).split() == ["name", "share", "nothing", "a", "0.1235", "–"]
    assert result.to_pandas().to_dict("records") == [{"name": "a", "share": 0.123456, "nothing": None}]
    assert "<td>0.1235</td>" in result._repr_html_()


def test_long_values_are_cut_where_they_are_shown_and_markup_is_escaped():
    hits = Hits([Hit("<b>", 1.5, "", "word " * 5000), Hit("2", 0.5, "t", "x")])
    assert len(repr(hits)) < 500
    assert len(hits._repr_html_()) < 2000
    assert "&lt;b&gt;" in hits._repr_html_()
    assert hits.to_pandas()["text"][0] == "word " * 5000
    assert repr(Hits()) == Hits()._repr_html_() == "Hits: empty"
    assert hits == list(hits)
    assert len(repr(Hits(hits * 500)).splitlines()) < 50


def test_results_of_an_evaluation_are_short(collection_folder):
    collection = anysplade.load_collection(collection_folder)
    assert repr(collection).split()[-4:] == [collection.name, "40", "20", "20"]
    found = evaluate("bm25", collection, ["nDCG@10"])
    assert len(repr(found)) < 400
    assert f"{found.metrics['nDCG@10']:.4g}" in repr(found)
    both = Evaluations([found, found], [], [], [])
    assert len(both.to_pandas()) == 2
    assert list(both.to_pandas().columns) == [
        "model", "collection", "nDCG@10", "query_active_dims", "document_active_dims", "flops",
        "query_own_words", "document_own_words"
    ]  # fmt: skip


PUBLIC = [value for value in (getattr(anysplade, name) for name in anysplade.__all__) if isinstance(value, type)]


@pytest.mark.parametrize("kind", [kind for kind in PUBLIC if hasattr(kind, "to_dict")], ids=lambda kind: kind.__name__)
def test_every_public_result_shows_itself_as_a_table(kind):
    assert issubclass(kind, Tabular)
    assert kind.__repr__ is Tabular.__repr__


def test_a_large_collection_is_not_printed():
    corpus = {str(i): Document("", "word " * 100) for i in range(1000)}
    assert len(repr(Collection("c", corpus, {}, {}))) < 200
