import json

import pandas
import pytest

from anysplade import DataError, Document, read_corpus


@pytest.mark.parametrize(
    "names",
    [
        *[("pid", "passage"), ("docid", "contents"), ("id", "content"), ("doc_id", "abstract"), ("document_id", "text")],
        *[("doc", "text"), ("DOCNO", "Text"), ("Passage-ID", "BODY"), ("did", "text"), ("Doc ID", "text")],
    ],
)
def test_common_names_of_columns(names, tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps(dict(zip(names, (7, "x"), strict=True))) + "\n")
    (tmp_path / "c.tsv").write_text("\t".join(names) + "\n7\tx\n")
    assert read_corpus(tmp_path / "c.jsonl") == read_corpus(tmp_path / "c.tsv") == {"7": Document("", "x")}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("c.csv", "", "the corpus is empty"),
        ("c.csv", "_id,text\n", "the corpus is empty"),
        ("c.tsv", "_id\ttext\n", "the corpus is empty"),
        ("c.csv", "_id,body text\n1,x\n", r'csv:2: "text" is missing or not a string; columns of the row: _id, body text'),
        ("c.csv", "name,text\n1,x\n", 'csv:2: no "_id"'),
        ("c.tsv", "docid\tsentence\n1\tx\n", 'tsv:2: "text" is missing'),
        ("c.csv", "_id,text\n,x\n", 'csv:2: no "_id"'),
        ("c.csv", "_id,text\n1,x\n1,y\n", "csv:3: the id '1' is a duplicate of line 2"),
        ("c.jsonl", '{"_id": 1, "text": "x"}\n{"_id": "1", "text": "y"}\n', "jsonl:2: the id '1' is a duplicate of line 1"),
        ("c.jsonl", '{"_id": 1.5, "text": "x"}\n', r'jsonl:1: no "_id".*found: 1\.5'),
        ("c.jsonl", '{"_id": "1", "contents": ["x"]}\n', 'jsonl:1: "contents" is missing or not a string'),
        ("c.jsonl", '{"_id": "1", "text": "x", "title": ["a"]}\n', r'jsonl:1: "title" is \["a"\], not a string'),
        ("c.jsonl", '{"_id": "1", "text": "x", "metadata": ["a"]}\n', 'jsonl:1: "metadata" is not an object'),
        ("c.jsonl", '{"_id": "1", "text": "x", "metadata": {"a": [NaN]}}\n', 'jsonl:1: "metadata" has a value that JSON cannot'),
        ("c.jsonl", '{"_id": "1", "text": "x", "metadata": {"a": Infinity}}\n', 'jsonl:1: "metadata" has a value that JSON'),
        ("c.jsonl", '{"_id": "1", "text": "x", "title": NaN}\n', 'jsonl:1: "title" is NaN, not a string'),
    ],
)
def test_faults_of_a_corpus_name_the_row(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_corpus(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_nan_in_a_parquet_file(tmp_path):
    pandas.DataFrame({"_id": ["a", "b"], "text": ["x", None]}).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r'c\.parquet:2: "text" is missing or not a string'):
        read_corpus(tmp_path / "c.parquet")
    pandas.DataFrame({"_id": [1.0, None], "text": ["x", "y"]}).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r'c\.parquet:1: no "_id".*found: 1\.0'):
        read_corpus(tmp_path / "c.parquet")
