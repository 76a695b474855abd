import json

import pytest

from anysplade import Index, OptionError, search_many
from anysplade.cli import main
from anysplade.data.queries import load_queries
from anysplade.evaluation.runs import read_run


@pytest.fixture
def index(static_index):
    with Index.load(static_index) as opened:
        yield opened


@pytest.mark.parametrize("exact", [False, True])
def test_many_searches_equal_single_ones(index, collection_folder, exact, monkeypatch):
    monkeypatch.setattr("anysplade.search.batch._BATCH", 3)
    queries = load_queries(collection_folder) | {"none": "qqqq"}
    found = dict(search_many(index, queries, 7, exact=exact))
    assert list(found) == list(queries)
    for id_, text in queries.items():
        assert list(found[id_].items()) == [(hit.id, hit.score) for hit in index.search(text, k=7, exact=exact)]


def test_malformed_queries_are_named(index):
    for queries, message in (({}, "at least one query"), ({"a": " "}, "query 'a': the query is empty"), (["a"], "texts by id")):
        with pytest.raises(OptionError, match=message):
            search_many(index, queries)
    with pytest.raises(OptionError, match="no document"):
        list(search_many(index, {"a": "kabel"}, filter={"nothing": "x"}))


def test_the_command_writes_a_run(static_index, collection_folder, tmp_path, capsys):
    """And the same scores as single searches; the run is not there before it is whole."""
    out, queries = tmp_path / "runs" / "a.trec", tmp_path / "queries.tsv"
    queries.write_text("".join(f"{id_}\t{text}\n" for id_, text in load_queries(collection_folder).items()))
    assert main(["search", str(static_index), "--queries", str(queries), "--out", str(out), "--k", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    run = read_run(out)
    assert (found["queries"], found["hits"]) == (20, sum(map(len, run.values())))
    with Index.load(static_index) as index:
        for id_, text in load_queries(collection_folder).items():
            assert run.get(id_, {}) == {hit.id: hit.score for hit in index.search(text, k=5)}
    before = out.read_bytes()
    queries.write_text("a\tkabel\nb c\tlodan\n")
    assert main(["search", str(static_index), "--queries", str(queries), "--out", str(out)]) == 2
    assert "white space is not possible" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("given", [[], ["kabel", "--queries", "q.tsv"], ["--queries", "q.tsv"], ["kabel", "--out", "a.trec"]])
def test_one_query_or_many(static_index, given, capsys):
    assert main(["search", str(static_index), *given]) == 2
    assert capsys.readouterr().err.count("\n") == 1
