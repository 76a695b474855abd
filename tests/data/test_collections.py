import gzip
import json
import shutil

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anysplade import (
    Collection,
    DataError,
    Document,
    OutputError,
    Pair,
    evaluate,
    load_collection,
    load_pairs,
    read_corpus,
    write_collection,
)
from anysplade.data.collections import collection_names, is_collection
from local_ir_datasets import Docs, Qrels, Queries, register
from tiny import make_repository


@pytest.fixture
def folder(tmp_path):
    collection = Collection("c", {"a": Document("T", "one"), "b": Document("", "two")}, {"q": "query"}, {"q": {"a": 2, "b": 0}})
    write_collection(tmp_path / "c", collection, [Pair("x", "y", ("z",))])
    return tmp_path / "c"


def test_round_trip(folder):
    collection = load_collection(folder)
    assert collection.corpus == {"a": Document("T", "one"), "b": Document("", "two")}
    assert collection.corpus["a"].full_text == "T one"
    assert collection.queries == {"q": "query"}
    assert collection.qrels == {"q": {"a": 2, "b": 0}}
    assert load_pairs(folder) == [Pair("x", "y", ("z",))]
    assert read_corpus(folder) == read_corpus(folder / "corpus.jsonl") == collection.corpus


ids = st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=("Cs",)), min_size=1)
texts = st.text(st.characters(exclude_categories=("Cs",)))
metadata = st.none() | st.dictionaries(texts, texts | st.integers(), min_size=1, max_size=2)
documents = st.builds(Document, texts, texts, metadata)


@settings(max_examples=50, deadline=None)
@given(corpus=st.dictionaries(ids, documents, min_size=1), queries=st.dictionaries(ids, texts, min_size=1))
def test_any_text_survives_the_disk(tmp_path_factory, corpus, queries):
    document = next(iter(corpus))
    collection = Collection("c", corpus, queries, {query: {document: 1} for query in queries})
    folder = tmp_path_factory.mktemp("c") / "c"
    write_collection(folder, collection)
    assert load_collection(folder) == collection


def test_only_judged_queries_are_kept(folder):
    with open(folder / "queries.jsonl", "a") as file:
        file.write(json.dumps({"_id": "unjudged", "text": "?"}) + "\n\n")
    assert list(load_collection(folder).queries) == ["q"]


def test_pairs_from_train_qrels(folder):
    (folder / "pairs.jsonl").unlink()
    with pytest.raises(DataError, match=r"needs pairs\.jsonl or qrels/train\.tsv, and anysplade pairs .* makes some"):
        load_pairs(folder)
    (folder / "qrels" / "train.tsv").write_text("q\ta\t1\nq\tb\t0\n")
    assert load_pairs(folder) == [Pair("query", "T one")]


def test_writing_into_a_full_folder_is_refused(folder):
    with pytest.raises(OutputError, match="not empty"):
        write_collection(folder, load_collection(folder))


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("corpus.jsonl", "", "the corpus is empty"),
        ("corpus.jsonl", "\n\n", "the corpus is empty"),
        ("corpus.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n', r"jsonl:2: the id 'a' is a duplicate of line 1"),
        ("corpus.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "b"', r"jsonl:2: not valid JSON"),
        ("corpus.jsonl", '{"_id": "a", "txt": "x"}\n', r'jsonl:1: "text" is missing or not a string; columns of the row: _id, txt'),
        ("corpus.jsonl", '{"text": "x"}\n', r'jsonl:1: no "_id"'),
        ("corpus.jsonl", "[1]\n", r"jsonl:1: not a JSON object"),
        ("queries.jsonl", "\n", r"queries\.jsonl: no query in it"),
        ("queries.jsonl", '{"_id": "q", "text": NaN}\n', r'queries\.jsonl:1: "text" is missing'),
        ("qrels/test.tsv", "", "no judgement"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq\tnope\t1\n", "c: none of the judged documents is in the corpus"),
        ("qrels/test.tsv", "nope\ta\t1\n", "c: no query has a judgement"),
        ("qrels/test.tsv", "q\ta\t0\nq\tb\t-1\n", "c: no document of the corpus is judged above 0, so every measure would be 0"),
        ("qrels/test.tsv", "q\ta\t0\nq\tnope\t1\n", "c: no document of the corpus is judged above 0, so every measure would be 0"),
        ("qrels/test.tsv", "q\ta\tgood\n", r"test\.tsv:1: the score 'good' is not a whole number"),
        ("qrels/test.tsv", "q a 1\n", r"test\.tsv:1: 1 columns"),
    ],
)
def test_faults_name_the_line(folder, file, content, message):
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=message):
        load_collection(folder)


def test_missing_parts_are_named(folder, tmp_path):
    with pytest.raises(DataError, match="splits found: test"):
        load_collection(folder, "dev")
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match=r"no corpus\.jsonl in it"):
        load_collection(folder)
    with pytest.raises(DataError, match="no such collection"):
        load_collection(tmp_path / "nowhere")


def test_text_that_is_not_utf_8(folder):
    (folder / "corpus.jsonl").write_bytes('{"_id": "a", "text": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        load_collection(folder)


def test_byte_order_mark_and_windows_lines(folder):
    for path in (folder / "corpus.jsonl", folder / "qrels" / "test.tsv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_collection(folder).qrels == {"q": {"a": 2, "b": 0}}


@pytest.fixture
def everywhere(collection_folder, tmp_path):
    """The same collection in every form: by the name of the form."""
    collection = load_collection(collection_folder)
    shutil.make_archive(str(tmp_path / "zipped"), "zip", collection_folder)
    shutil.make_archive(str(tmp_path / "nested"), "zip", collection_folder.parent, collection_folder.name)
    gzipped = tmp_path / "gzipped"
    shutil.copytree(collection_folder, gzipped)
    for path in (gzipped / "corpus.jsonl", gzipped / "queries.jsonl", gzipped / "qrels" / "test.tsv"):
        (path.parent / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    for form in ("tsv", "trec"):
        (tmp_path / form).mkdir()
        (tmp_path / form / "corpus.tsv").write_text("".join(f"{id_}\t{d.text}\n" for id_, d in collection.corpus.items()))
        judged = [f"{q} 0 {d} {g}\n" for q, grades in collection.qrels.items() for d, g in grades.items()]
        (tmp_path / form / "qrels.txt").write_text("".join(judged))
    (tmp_path / "tsv" / "queries.tsv").write_text("".join(f"{id_}\t{text}\n" for id_, text in collection.queries.items()))
    topics = [
        f"<top>\n<num> Number: {id_}\n<title> {text}\n<desc> Description:\nno\n</top>\n" for id_, text in collection.queries.items()
    ]
    (tmp_path / "trec" / "topics.txt").write_text("\n".join(topics))
    documents = [(id_, document.text) for id_, document in collection.corpus.items()]
    register("anysplade-tiny/test", Docs(documents), Queries(collection.queries), Qrels(collection.qrels))
    tables = {
        "corpus": [{"_id": id_, "text": text} for id_, text in documents],
        "queries": [{"_id": id_, "text": text} for id_, text in collection.queries.items()],
        "default": [
            {"query-id": q, "corpus-id": d, "score": float(g)} for q, grades in collection.qrels.items() for d, g in grades.items()
        ],
    }
    make_repository(tmp_path / "hub", tables, "test")
    names = {form: str(tmp_path / form) for form in ("gzipped", "tsv", "trec", "hub")}
    return names | {
        "folder": str(collection_folder),
        "zip": str(tmp_path / "zipped.zip"),
        "zip of a folder": str(tmp_path / "nested.zip"),
        "ir_datasets": "anysplade-tiny/test",
        "ir_datasets without the split": "anysplade-tiny",
    }


def test_every_form_holds_the_same_collection(everywhere, backbone):
    loaded = {form: load_collection(source) for form, source in everywhere.items()}
    first = loaded["folder"]
    for form, collection in loaded.items():
        assert (collection.corpus, collection.queries, collection.qrels) == (first.corpus, first.queries, first.qrels), form
    scores = {form: evaluate("bm25", collection).metrics for form, collection in loaded.items()}
    assert all(score == scores["folder"] for score in scores.values())
    for form in ("zip", "tsv", "ir_datasets without the split"):
        assert is_collection(everywhere[form].removesuffix("/test"))
    assert not is_collection(backbone)
    assert read_corpus(everywhere["zip"]) == read_corpus("anysplade-tiny/test") == first.corpus


@pytest.mark.parametrize("form", ["csv", "tsv", "tsv with names", "parquet", "hub", "zip", "ir_datasets without the split"])
def test_what_can_be_evaluated_can_be_read_as_a_corpus(form, everywhere, tmp_path):
    first = load_collection(everywhere["folder"])
    if form in everywhere:
        assert read_corpus(everywhere[form]) == first.corpus
        return
    folder = tmp_path / "tables"
    shutil.copytree(everywhere["folder"], folder)
    kind = form.partition(" ")[0]
    for name in ("corpus", "queries"):
        frame = pandas.read_json(folder / f"{name}.jsonl", lines=True, dtype=False)
        (folder / f"{name}.jsonl").unlink()
        path = folder / f"{name}.{kind}"
        if kind == "parquet":
            frame.to_parquet(path)
        else:
            frame[["_id", "text"]].to_csv(path, index=False, sep="," if kind == "csv" else "\t", header=form != "tsv")
    assert load_collection(folder).corpus == read_corpus(folder) == read_corpus(folder / f"corpus.{kind}") == first.corpus
    assert load_collection(folder).queries == first.queries


@pytest.mark.parametrize("form", ["beir", "trec"])
def test_grades_that_are_whole_floats(form, folder):
    path = folder / "qrels" / "test.tsv" if form == "beir" else folder / "qrels.txt"
    line = "q\t{}\t{}\n" if form == "beir" else "q 0 {} {}\n"
    if form == "trec":
        shutil.rmtree(folder / "qrels")
    path.write_text(line.format("a", "1.0") + line.format("b", "2e0") + line.format("a", "1"))
    assert load_collection(folder).qrels == {"q": {"a": 1, "b": 2}}
    for grade in ("1.5", "nan", "inf"):
        path.write_text(line.format("a", grade))
        with pytest.raises(DataError, match=rf":1: the score '{grade}' is not a whole number"):
            load_collection(folder)
    path.write_text(line.format("a", "1") + line.format("a", "0"))
    with pytest.raises(DataError, match=r":2: 'a' has the grade 0 for the query 'q', and 1 before; keep one"):
        load_collection(folder)


@pytest.mark.parametrize(
    "judged, message",
    [
        ([{"query-id": "q", "corpus-id": "a", "score": 1.5}], "judgement 1: the score '1.5' is not a whole number"),
        ([{"query": "q", "document": "a", "score": 1}], "judgement 1: no query-id and corpus-id"),
    ],
)
def test_judgements_of_a_hub_dataset(judged, message, tmp_path):
    tables = {"corpus": [{"_id": "a", "text": "x"}], "queries": [{"_id": "q", "text": "x"}], "qrels": judged}
    make_repository(tmp_path / "hub", tables, "test")
    with pytest.raises(DataError, match=message):
        load_collection(tmp_path / "hub")


def test_a_hub_folder_that_changed_or_has_the_name_of_another(tmp_path):
    """The datasets library keeps rows of a folder under its last name alone."""
    for folder, text in ((tmp_path / "a" / "hub", "one"), (tmp_path / "b" / "hub", "two")):
        make_repository(folder, {"corpus": [{"_id": "d", "text": text}]})
        assert read_corpus(folder) == {"d": Document("", text)}
    shutil.rmtree(folder)
    make_repository(folder, {"corpus": [{"_id": "d", "text": "three"}]})
    assert read_corpus(folder) == {"d": Document("", "three")}


def test_half_characters_in_a_collection_of_python(tmp_path):
    """Texts are written as JSON has them; ids, which qrels would hold, cannot be."""
    collection = Collection("c", {"a": Document("", "x \ud83d")}, {"q": "x"}, {"q": {"a": 1}})
    write_collection(tmp_path / "c", collection)
    assert load_collection(tmp_path / "c").corpus == {"a": Document("", "x \ufffd")}
    odd = Collection("c", {"a\ud83d": Document("", "x")}, {"q": "x"}, {"q": {"a\ud83d": 1}})
    with pytest.raises(OutputError, match="cannot contain a tab, line break or lone surrogate"):
        write_collection(tmp_path / "d", odd)
    with pytest.raises(OutputError, match="a lone surrogate is not possible in a run file"):
        evaluate("bm25", odd, output=tmp_path / "scores")


def test_nanobeir_is_thirteen_collections(folder, tmp_path, monkeypatch):
    assert len(collection_names("NanoBEIR")) == 13
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "nanobeir")
    assert len(collection_names("nanobeir")) == 13
    assert collection_names("./nanobeir") == ["./nanobeir"]
    assert collection_names("beir/scifact") == ["beir/scifact"]


@pytest.mark.parametrize("form", ["beir", "zip", "trec", "hub"])
def test_judgements_of_what_is_not_there_in_any_form(form, folder, tmp_path, caplog):
    judged = [("q", "a", 1), ("q", "gone", 1), ("nobody", "b", 1)]
    source = folder
    if form == "trec":
        shutil.rmtree(folder / "qrels")
        (folder / "qrels.txt").write_text("".join(f"{q} 0 {d} {g}\n" for q, d, g in judged))
    elif form == "hub":
        tables = {"corpus": [{"_id": "a", "text": "one"}], "queries": [{"_id": "q", "text": "query"}]}
        tables["qrels"] = [{"query-id": q, "corpus-id": d, "score": g} for q, d, g in judged]
        make_repository(tmp_path / "h*b [1]", tables, "test")  # whose name is no pattern
        source = tmp_path / "h*b [1]"
    else:
        (folder / "qrels" / "test.tsv").write_text("".join(f"{q}\t{d}\t{g}\n" for q, d, g in judged))
        source = shutil.make_archive(str(tmp_path / "zipped"), "zip", folder) if form == "zip" else folder
    loaded = load_collection(source)
    assert (loaded.queries, loaded.qrels) == ({"q": "query"}, {"q": {"a": 1, "gone": 1}})
    assert "1 judged queries are not among the queries and left out, such as 'nobody'" in caplog.text
    assert "1 judged documents are not in the corpus, such as 'gone'" in caplog.text


def test_queries_without_a_relevant_document_are_counted(folder, caplog):
    with open(folder / "queries.jsonl", "a") as file:
        file.write('{"_id": "r", "text": "x"}\n')
    (folder / "qrels" / "test.tsv").write_text("q\ta\t1\nr\ta\t0\n")
    assert load_collection(folder).qrels == {"q": {"a": 1}, "r": {"a": 0}}
    assert "1 queries have no document judged above 0 and count as 0, such as 'r'" in caplog.text


def test_judgements_of_what_is_not_there(collection_folder, caplog):
    """Standard collections have them: they count against recall, as in trec_eval, and are said."""
    collection = load_collection(collection_folder)
    documents = [(id_, document.text) for id_, document in collection.corpus.items()]
    judged = {"q0": {"d0": 1, "gone": 1}, "nobody": {"d1": 1}}
    register("anysplade-more/test", Docs(documents), Queries(collection.queries), Qrels(judged))
    loaded = load_collection("anysplade-more/test")
    assert loaded.qrels == {"q0": {"d0": 1, "gone": 1}}
    assert "1 judged queries are not among the queries" in caplog.text
    assert "1 judged documents are not in the corpus" in caplog.text
    assert evaluate("bm25", loaded, ["R@100"]).metrics["R@100"] == 0.5
    register("anysplade-none/test", Docs(documents), Queries(collection.queries), Qrels({"q0": {"gone": 1}}))
    with pytest.raises(DataError, match="none of the judged documents is in the corpus"):
        load_collection("anysplade-none/test")
    register("anysplade-docs", Docs(documents))
    with pytest.raises(DataError, match="no queries with judgements"):
        load_collection("anysplade-docs")


HOSTILE = {
    "empty qrels": ({"qrels/test.tsv": "query-id\tcorpus-id\tscore\n"}, "no judgement in it"),
    "missing header": ({"qrels/test.tsv": "q\ta\t1\n"}, None),
    "unknown ids": ({"qrels/test.tsv": "q\tx\t1\n"}, "none of the judged documents is in the corpus"),
    "duplicate ids": ({"corpus.jsonl": '{"_id": "a", "text": "x"}\n' * 2}, "is a duplicate of line 1"),
    "ids with spaces": (
        {"corpus.jsonl": '{"_id": "a b", "text": "one"}\n', "qrels/test.tsv": "q\ta b\t1\n"},
        None,  # evaluated; a run file cannot hold it: see test_evaluation
    ),
    "an id of a million digits": (
        {"corpus.jsonl": f'{{"_id": "{"7" * 10**6}", "text": "one"}}\n', "qrels/test.tsv": f"q\t{'7' * 10**6}\t1\n"},
        None,
    ),
    "a number of a million digits": ({"corpus.jsonl": f'{{"_id": {"7" * 10**6}, "text": "one"}}\n'}, "a number too long"),
    "a grade that is no number": ({"qrels/test.tsv": "q\ta\thigh\n"}, "the score 'high' is not a whole number"),
    "an empty query": ({"queries.jsonl": '{"_id": "q", "text": ""}\n'}, None),
    "an empty document": ({"corpus.jsonl": '{"_id": "a", "text": ""}\n{"_id": "b", "text": "two"}\n'}, None),
    "a long document": ({"corpus.jsonl": json.dumps({"_id": "a", "text": "kabel " * 100_000}) + "\n"}, None),
    "one document": ({"corpus.jsonl": '{"_id": "a", "text": "one"}\n'}, None),
    "negative grades": ({"qrels/test.tsv": "q\ta\t2\nq\tb\t-1\n"}, None),
    "nested too deep": ({"corpus.jsonl": "[" * 10**5 + "\n"}, "cannot be read"),
    "NUL bytes": ({"corpus.jsonl": "\0\0\n"}, "not valid JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_collections(case, folder, backbone):
    files, message = HOSTILE[case]
    (folder / "qrels" / "test.tsv").write_text("q\ta\t1\n")
    for name, content in files.items():
        (folder / name).write_text(content)
    if message is not None:
        with pytest.raises(DataError, match=message) as caught:
            load_collection(folder)
        assert "\n" not in str(caught.value)
        return
    collection = load_collection(folder)
    for model in ("bm25", backbone):
        values = evaluate(model, collection).metrics.values()
        assert all(0 <= value <= 1 for value in values)
