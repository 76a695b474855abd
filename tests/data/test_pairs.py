import gzip
import json
import re
import shutil

import pandas
import pytest

from anysplade import Collection, DataError, Document, Pair, load_pairs, write_collection
from anysplade.cli import main
from local_ir_datasets import Docs, Qrels, Queries, Triples, register
from tiny import make_repository


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


PAIR = {"query": "q", "positive": "p"}


@pytest.mark.parametrize(
    "row, pairs",
    [
        (PAIR, [Pair("q", "p")]),
        ({"anchor": "q", "positive": "p"}, [Pair("q", "p")]),
        ({"question": "q", "answer": "p", "id": 7}, [Pair("q", "p")]),
        ({"positive": "p", "query": "q"}, [Pair("q", "p")]),  # by name, not by order
        (PAIR | {"negative": "n"}, [Pair("q", "p", ("n",))]),
        (PAIR | {"negatives": ["n", "m"]}, [Pair("q", "p", ("n", "m"))]),
        (PAIR | {f"negative_{i}": f"n{i}" for i in (10, 2, 1)}, [Pair("q", "p", ("n1", "n2", "n10"))]),
        (PAIR | {"negative": "n", "score": 3}, [Pair("q", "p", ("n",), (3.0,))]),
        (PAIR | {"negatives": ["n", "m"], "scores": [3, 1.5, 1]}, [Pair("q", "p", ("n", "m"), (3.0, 1.5, 1.0))]),
        ({"query": "q", "documents": ["a", "b", "c"], "scores": [0.1, 3, 2]}, [Pair("q", "b", ("c", "a"), (3.0, 2.0, 0.1))]),
        # a teacher's scores may be negative; two positives and a negative may have one each
        ({"query": "q", "documents": ["a", "b"], "scores": [-3, -2]}, [Pair("q", "b", ("a",), (-2.0, -3.0))]),
        (PAIR | {"negative": "n", "label": -1.5}, [Pair("q", "p", ("n",), (-1.5,))]),
        (
            {"query": "q", "pos": ["p", "r"], "neg": ["n"], "scores": [3, 4, 1]},
            [Pair("q", "p", ("n",), (3.0, 1.0)), Pair("q", "r", ("n",), (4.0, 1.0))],
        ),
        # labels say which documents are answers
        (PAIR | {"label": 1}, [Pair("q", "p")]),
        ({"query": "q", "positives": ["p", "r", "s"], "labels": [2, 0, 1]}, [Pair("q", "p"), Pair("q", "s")]),
        (
            {"query": "q", "documents": ["a", "b", "c"], "labels": [1, 0, 2]},
            [Pair("q", "c", ("b",), (2.0, 0.0)), Pair("q", "a", ("b",), (1.0, 0.0))],
        ),
        (
            {"query": "q", "documents": ["a", "b", "c"], "labels": [1, 0, 0], "scores": [7, 8, 9]},
            [Pair("q", "a", ("c", "b"), (7.0, 9.0, 8.0))],
        ),
        # FlagEmbedding's and Tevatron's layouts
        ({"query": "q", "pos": ["p", "r"], "neg": ["n"]}, [Pair("q", "p", ("n",)), Pair("q", "r", ("n",))]),
        (
            {"query": "q", "pos": ["p", "r"], "neg": ["n"], "pos_scores": [3, 4], "neg_scores": [1]},
            [Pair("q", "p", ("n",), (3.0, 1.0)), Pair("q", "r", ("n",), (4.0, 1.0))],
        ),
        (
            {
                "query_id": "7",
                "query": "q",
                "positive_passages": [{"docid": "1", "title": "T", "text": "p"}],
                "negative_passages": [{"docid": "2", "title": "", "text": "n"}],
            },
            [Pair("q", "T p", ("n",))],
        ),
        (
            {"query": "q", "pos": ["p"], "neg": ["n"], "pos_id": ["1"], "neg_id": ["2"], "prompt": "", "type": "normal"},
            [Pair("q", "p", ("n",))],
        ),
        ({"query": "q", "pos": ["p"], "negs": ["n"]}, [Pair("q", "p", ("n",))]),
        (
            {
                "question": "q",
                "answers": ["a"],
                "positive_ctxs": [{"title": "T", "text": "p"}],
                "hard_negative_ctxs": [{"text": "n"}],
            },
            [Pair("q", "T p", ("n",))],
        ),
        (
            {
                "query": "q",
                "query_id": 7,
                "answers": ["a"],
                "passages": {"is_selected": [0, 1, 0], "passage_text": ["n", "p", "m"], "url": ["", "", ""]},
            },
            [Pair("q", "p", ("n", "m"), (1.0, 0.0, 0.0))],
        ),
        (
            {"query": "q", "passages": [{"is_selected": 1, "passage_text": "p"}, {"is_selected": 0, "passage_text": "n"}]},
            [Pair("q", "p", ("n",), (1.0, 0.0))],
        ),
        ({"query": "😀😀", "positive": "🐍"}, [Pair("😀😀", "🐍")]),
        ({"query": "q " * 100_000, "positive": "p"}, [Pair("q " * 100_000, "p")]),
    ],
)
def test_layouts_of_a_row(row, pairs, tmp_path):
    assert load_pairs(write(tmp_path / "data.jsonl", row)) == pairs


def test_a_query_without_a_selected_passage(tmp_path, caplog):
    caplog.set_level("INFO", "anysplade")
    answered, unanswered = (
        {"query": "q", "passages": [{"is_selected": s, "passage_text": t} for s, t in ((first, "p"), (0, "n"))]} for first in (1, 0)
    )
    path = write(tmp_path / "data.jsonl", unanswered, answered, unanswered)
    assert load_pairs(path) == [Pair("q", "p", ("n",), (1.0, 0.0))]
    assert "2 of 3 rows left out: their labels are 0 or below" in caplog.text
    with pytest.raises(DataError, match="no training pair in it"):
        load_pairs(write(path, unanswered))


def test_texts_and_scores_of_a_csv(tmp_path):
    """A cell that looks like a number, or like none, is a text in a column of texts."""
    path = write(tmp_path / "data.csv", "query,positive,negative,score", "2024,NA,null,1.5", "None,007,1e5,-2")
    assert load_pairs(path) == [Pair("2024", "NA", ("null",), (1.5,)), Pair("None", "007", ("1e5",), (-2.0,))]
    with pytest.raises(DataError, match=r'csv:2: "score" has "high"; give finite numbers'):
        load_pairs(write(path, "query,positive,negative,score", "q,p,n,high"))


@pytest.mark.parametrize(
    "relevant, irrelevant",
    [
        (PAIR | {"label": 1}, PAIR | {"label": 0}),
        (PAIR | {"label": 1}, PAIR | {"label": -1}),
        (PAIR | {"score": 0.5}, PAIR | {"score": 0.0}),
        (PAIR | {"score": 0.5, "label": 1}, PAIR | {"score": 0.5, "label": 0}),
        ({"query": "q", "positives": ["p"], "labels": [1]}, {"query": "q", "positives": ["a", "b"], "labels": [0, 0]}),
        (
            {"query": "q", "positives": ["p"], "negatives": [], "label": 1},
            {"query": "q", "positives": ["p"], "negatives": [], "label": 0},
        ),
        ({"query": "q", "documents": ["p"], "labels": [1]}, {"query": "q", "documents": ["a", "b"], "labels": [0, -1]}),
        ({"query": "q", "documents": ["p"], "labels": [1]}, {"query": "q", "documents": ["a", "b"], "labels": [0, 0]}),
    ],
)
def test_a_document_that_is_labelled_no_answer_is_no_positive(relevant, irrelevant, tmp_path, caplog):
    caplog.set_level("INFO", "anysplade")
    path = write(tmp_path / "data.jsonl", irrelevant, relevant, irrelevant)
    assert load_pairs(path) == [Pair("q", "p")]
    assert f"{path}: 2 of 3 rows left out: their labels are 0 or below" in caplog.text
    with pytest.raises(DataError, match="no training pair in it; a row needs a document with a label above 0"):
        load_pairs(write(path, irrelevant))


def test_judgements_of_a_beir_folder(folder, tmp_path, caplog):
    caplog.set_level("INFO", "anysplade")
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t2\nq\td2\t0\nq\td3\t-1\n")
    assert load_pairs(folder) == [Pair("query", "T one")]
    assert "2 of 3 rows left out" in caplog.text


def test_columns_are_echoed(tmp_path, caplog):
    caplog.set_level("INFO", "anysplade")
    load_pairs(write(tmp_path / "data.jsonl", {"question": "q", "pos": ["p"], "neg": ["n"], "source": "web"}))
    assert 'columns: query from "question", positive from "pos", negative from "neg"; not used: source' in caplog.text
    load_pairs(write(tmp_path / "data.jsonl", PAIR | {"label": 1, "pos_scores": [3]}))
    assert "columns: query, positive, label; not used: pos_scores" in caplog.text
    load_pairs(write(tmp_path / "data.jsonl", PAIR | {"negative": "n", "label": 1, "score": 2}))
    assert 'columns: query, positive, negative, scores from "score"; not used: label' in caplog.text


def test_the_first_negatives(tmp_path):
    path = write(
        tmp_path / "data.jsonl",
        PAIR | {"negatives": ["a", "b", "c"], "scores": [9, 3, 2, 1]},
        PAIR | {"negatives": ["d", "e"], "scores": [9, 1, 0]},
    )
    assert [pair.negatives for pair in load_pairs(path, negatives=2)] == [("a", "b"), ("d", "e")]
    assert [pair.scores for pair in load_pairs(path, negatives=1)] == [(9.0, 3.0), (9.0, 1.0)]
    assert load_pairs(path, negatives=0) == [Pair("q", "p")] * 2
    with pytest.raises(DataError, match=r"data\.jsonl:2: 2 negatives, but `negatives` is 3"):
        load_pairs(path, negatives=3)


def test_gzip_csv_tsv_and_parquet(tmp_path):
    rows = [PAIR | {"negative": "n"}, {"query": "q2", "positive": "p2, with a comma", "negative": "n2"}]
    with gzip.open(tmp_path / "data.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    frame = pandas.DataFrame(rows)
    frame.to_csv(tmp_path / "data.csv", index=False)
    frame.to_csv(tmp_path / "data.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "data.parquet")
    expected = load_pairs(write(tmp_path / "data.jsonl", *rows))
    for name in ("data.jsonl.gz", "data.csv", "data.tsv", "data.parquet"):
        assert load_pairs(tmp_path / name) == expected, name


@pytest.fixture
def folder(tmp_path):
    documents = {"d1": Document("T", "one"), "d2": Document("", "two"), "d3": Document("", "three")}
    write_collection(tmp_path / "c", Collection("c", documents, {"q": "query"}, {"q": {"d1": 1}}))
    return tmp_path / "c"


def test_ids_in_a_beir_folder(folder):
    write(folder / "pairs.jsonl", {"query_id": "q", "positive_id": "d1", "negative_ids": ["d2", "d3"], "scores": [3, 2, 1]})
    assert load_pairs(folder) == [Pair("query", "T one", ("two", "three"), (3.0, 2.0, 1.0))]


def test_ids_with_their_texts_elsewhere(folder, tmp_path):
    path = write(tmp_path / "ids.jsonl", {"query_id": "q", "doc_ids": ["d2", "d1"], "labels": [0, 1]})
    assert load_pairs(path, texts=str(folder)) == [Pair("query", "T one", ("two",), (1.0, 0.0))]
    with pytest.raises(DataError, match=r"ids\.jsonl:1: the row has ids; name the collection of their texts with `texts`"):
        load_pairs(path)
    for row in ({"query_id": "q", "positive": "d1"}, {"query": "q", "positive_id": "d1"}):  # else trained on as they stand
        with pytest.raises(DataError, match=r'ids\.jsonl:1: "(positive|query)" is \'(d1|q)\', an id of `texts`; name the column'):
            load_pairs(write(path, row), texts=str(folder))
    write(tmp_path / "ids.csv", "query_id,positive_id", "q,d1")
    assert load_pairs(tmp_path / "ids.csv", texts=str(folder)) == [Pair("query", "T one")]
    write(path, {"query_id": "q", "positive_id": "d9"})
    with pytest.raises(DataError, match=r"ids\.jsonl:1: the document 'd9' is not in "):
        load_pairs(path, texts=str(folder))


@pytest.mark.parametrize("positive", ["D1000", "MED-1000", "ug7v899j"])
def test_single_words_with_a_digit_are_worth_a_warning(positive, tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", *({"query": f"what is it {i}", "positive": f"{positive}{i}"} for i in range(3)))
    assert len(load_pairs(path)) == 3
    assert f"the first texts of positive are single words such as '{positive}0'; if they are ids, name the column" in caplog.text


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.tsv", "1185869\t0\t16\n1185868\t1\t17\n", "a.tsv:1: only numbers, where columns must be named; .*query_id.*`texts`"),
        ("a.csv", "1185869,0,0,1\n", "a.csv:1: only numbers, where columns must be named"),  # a qrels table
        ("a.tsv", "query\tpositive\tnegative\n1185869\t0\t16\n7\t1\t17\n", "positive has ids, such as '0', .*query_id.*`texts`"),
        ("a.csv", "query,positive,negative\nwhat is it,a text,16\n", "negative has ids, such as '16'"),
        ("a.jsonl", '{"query": "what is it", "pos": ["7187158"], "neg": ["16", "17"]}\n', "positive has ids, such as '7187158'"),
        ("c/a.jsonl", '{"query": "what is it", "positive": "d1"}\n', "positive has ids, such as 'd1'"),
        ("c/pairs.jsonl", '{"query": "q", "positive": "what it is"}\n', "query has ids, such as 'q'"),
    ],
)
def test_ids_are_not_trained_on_as_texts(name, content, message, folder, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_pairs(tmp_path / name)


def test_texts_that_only_look_like_ids(folder, caplog):
    """Words beside a collection are texts unless they are its ids; a number that is searched for may be one of a part."""
    assert load_pairs(write(folder / "a.jsonl", {"query": "car", "positive": "automobile"})) == [Pair("car", "automobile")]
    assert not caplog.records
    assert load_pairs(write(folder / "a.jsonl", {"query": "1185869", "positive": "a bolt"})) == [Pair("1185869", "a bolt")]
    assert "a.jsonl: the first queries are only numbers; if they are ids, name the column query_id" in caplog.text


def test_a_dataset_repository(tmp_path):
    """As on the hub: a folder a config, whole numbers for ids, texts in the configs queries and corpus."""
    tables = {
        "queries": {"query_id": ["1", "2"], "query": ["q1", "q2"]},
        "corpus": {"passage_id": ["10", "20"], "passage": ["p10", "p20"]},
        "triplets": {"query_id": [1, 2], "positive_id": [10, 20], "negative_id": [20, 10]},
        "texts": {"query": ["q"], "positive": ["p"], "negative": ["n"]},
    }
    make_repository(tmp_path / "repo", tables)
    repo = str(tmp_path / "repo")
    assert load_pairs(f"{repo}:texts") == [Pair("q", "p", ("n",))]
    assert load_pairs(f"{repo}:triplets") == [Pair("q1", "p10", ("p20",)), Pair("q2", "p20", ("p10",))]
    make_repository(
        tmp_path / "beir", {"queries": [{"_id": "q", "text": "query"}], "corpus": [{"_id": "a", "text": "p", "title": "T"}]}
    )
    path = write(tmp_path / "ids.jsonl", {"query_id": "q", "positive_id": "a"})
    assert load_pairs(path, texts=str(tmp_path / "beir")) == [Pair("query", "T p")]  # by name, whatever their order
    with pytest.raises(DataError, match=r"cannot be read: .*nothing-such"):
        load_pairs(f"{repo}:nothing-such")


@pytest.fixture(scope="module", autouse=True)
def registered():
    docs, queries = Docs([(f"d{i}", f"text {i}") for i in range(3)]), Queries({"q": "the query"})
    register("anysplade-test", docs)
    register("anysplade-bare", docs)
    register("anysplade-test/train", docs, queries, Qrels({"q": {"d0": 1, "d1": 0}}))
    register("anysplade-test/train/triples", docs, queries, Triples([("q", "d0", "d2")]))


def test_ir_datasets_judgements_and_triples(tmp_path):
    assert load_pairs("anysplade-test/train") == [Pair("the query", "text 0")]
    assert load_pairs("anysplade-test/train/triples") == [Pair("the query", "text 0", ("text 2",))]
    path = write(tmp_path / "ids.jsonl", {"query_id": "q", "positive_id": "d1"})
    assert load_pairs(path, texts="anysplade-test/train") == [Pair("the query", "text 1")]
    assert load_pairs("anysplade-test") == load_pairs("anysplade-test/train")  # as a collection's id works without its /test
    with pytest.raises(DataError, match="no triples or judgements"):
        load_pairs("anysplade-bare")


def test_what_can_be_evaluated_can_be_trained_on(collection_folder, tmp_path):
    """A zip archive, TREC's files and a collection of the hub, each with its judgements or its pairs."""
    pairs = load_pairs(collection_folder)
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", collection_folder.parent, collection_folder.name)
    assert load_pairs(archive) == pairs
    ids = write(tmp_path / "ids.jsonl", {"query_id": "q0", "positive_id": "d0"})
    assert load_pairs(ids, texts=archive) == load_pairs(ids, texts=str(collection_folder))
    folder = tmp_path / "trec"
    folder.mkdir()
    (folder / "docs.tsv").write_text("a\tfirst text\nb\tsecond text\n")
    (folder / "topics.tsv").write_text("1\tthe query\n")
    (folder / "qrels.train.txt").write_text("1 0 a 1\n1 0 b 0\n")
    assert load_pairs(folder) == [Pair("the query", "first text")]
    tables = {
        "queries": [{"_id": "q", "text": "query"}],
        "corpus": [{"_id": "a", "text": "p", "title": "T"}],
        "default": [{"query-id": "q", "corpus-id": "a", "score": 1}],
    }
    make_repository(tmp_path / "hub", tables)
    assert load_pairs(f"{tmp_path / 'hub'}:default", texts=str(tmp_path / "hub")) == [Pair("query", "T p")]
    assert load_pairs(f"{tmp_path / 'hub'}:default") == [Pair("query", "T p")]


MALFORMED = {
    "no file": (None, [], "no such file; check the path"),
    "empty": ([], [], "no training pair in it"),
    "one pair": ([PAIR], [], "one pair is too few"),
    "missing column": (
        [{"query": "q", "text": "p"}],
        [],
        r":1: no column for the positive \(columns: query, text\)",
    ),
    "missing column later": ([PAIR, {"query": "q"}], [], r':2: "positive" is missing'),
    "wrong type": ([{"query": ["a", "b"], "positive": "p"}], [], ":1: 2 queries"),
    "number for a text": ([PAIR, {"query": "q", "positive": 3}], [], r':2: "positive" is 3, not a string'),
    "empty text": ([PAIR, {"query": " ", "positive": "p"}], [], r':2: "query" is empty'),
    "NaN score": (['{"query": "q", "positive": "p", "negative": "n", "score": NaN}'], [], r':1: "score" has NaN'),
    "score that is a text": ([PAIR | {"negative": "n", "score": "high"}], [], r':1: "score" has "high"'),
    "too few scores": ([PAIR | {"negatives": ["a", "b", "c"], "scores": [1]}], [], ":1: 1 scores for 1 positive and 3 negatives"),
    "labels that are not one each": (
        [{"query": "q", "pos": ["a", "b", "c"], "labels": [1, 0]}],
        [],
        ":1: 2 labels for 3 positives",
    ),
    "scores that fit no document": (
        [{"query": "q", "pos": ["a", "b"], "neg": ["c"], "scores": [1]}],
        [],
        ":1: 1 scores for 2 positives and 1 negative",
    ),
    "truncated line": ([PAIR, '{"query": "q", "posit'], [], ":2: not valid JSON"),
    "not an object": ([PAIR, '["q", "p"]'], [], ":2: not a JSON object"),
    "wrong encoding": (["é".encode("latin-1")], [], ":1: not UTF-8"),
    "no negatives": ([PAIR] * 3, ["--objective", "kl"], "no negatives, which kl needs"),
    "more negatives in some rows": (
        [PAIR | {"negatives": ["a"]}, PAIR | {"negatives": ["a", "b"]}],
        [],
        r":2: 2 negatives and 0 scores, but the rows before have 1 negatives .* --negatives N",
    ),
    "a negative in some rows": ([PAIR, PAIR | {"negative": "n"}], [], r':2: "negative" is new here'),
    "no scores": ([PAIR | {"negative": "n"}] * 3, ["--objective", "margin-mse"], "no scores"),
    "unknown id": ([{"query_id": "q", "positive_id": "d9"}], ["--texts", "FOLDER"], ":1: the document 'd9' is not in"),
    "unknown objective": ([PAIR] * 3, ["--objective", "listwise"], "'listwise' is none of contrastive, margin-mse, kl"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_cannot_be_trained_on_is_one_line(case, backbone, folder, tmp_path, capsys):
    rows, options, message = MALFORMED[case]
    path = tmp_path / "data.jsonl"
    if rows is not None:
        path.write_bytes(
            b"".join(
                (row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()) + b"\n"
                for row in rows
            )
        )
    options = [str(folder) if option == "FOLDER" else option for option in options]
    code = main(["train", backbone, str(path), "--out", str(tmp_path / "run"), "--steps", "1", *options])
    said = capsys.readouterr()
    complaint = [line for line in said.err.splitlines() if line.startswith("anysplade: ")]
    assert code == 2
    assert not said.out
    assert len(complaint) == 1
    assert re.search(message, complaint[0]), complaint[0]
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_duplicate_ids_are_one_line(backbone, folder, tmp_path, capsys):
    with open(folder / "corpus.jsonl", "a") as file:
        file.write('{"_id": "d1", "text": "again"}\n')
    write(folder / "pairs.jsonl", {"query_id": "q", "positive_id": "d1"})
    assert main(["train", backbone, str(folder), "--out", str(tmp_path / "run")]) == 2
    assert "corpus.jsonl:4: the id 'd1' is a duplicate of line 1" in capsys.readouterr().err


def test_a_damaged_gzip_file(tmp_path):
    data = gzip.compress(b'{"query": "q", "positive": "p"}\n' * 1000)
    (tmp_path / "data.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="damaged or cut off"):
        load_pairs(tmp_path / "data.jsonl.gz")
