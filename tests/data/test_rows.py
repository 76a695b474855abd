import bz2
import gzip
import json
import lzma
import os

import pandas
import pyarrow
import pytest

from anysplade import DataError
from anysplade.data.rows import rows


def test_rows_of_tables_are_those_of_json(tmp_path):
    """Cells of CSV and TSV are texts, whatever they look like; the number is that of a row's first line."""
    texts = ["None", "NA", "null", "nan", "007", "1e5", "true", ' "quoted", with a comma', "two\nlines", "a\ttab", "x" * 200_000]
    found = [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)]
    frame = pandas.DataFrame(found)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    for name in ("a.jsonl", "a.csv", "a.csv.gz", "a.tsv", "a.parquet"):
        assert [row for _, row in rows(tmp_path / name)] == found, name
    assert [number for number, _ in rows(tmp_path / "a.csv")] == [*range(2, 11), 12, 13]


@pytest.mark.parametrize("name", ["corpus[1].parquet", "pairs*.parquet", "c?.parquet", "a::b.parquet", "{a,b}.PARQUET"])
def test_a_path_is_no_pattern(name, tmp_path):
    for other in ("corpus1.parquet", "pairsx.parquet", "cc.parquet", "a.PARQUET"):
        pandas.DataFrame({"_id": ["other"]}).to_parquet(tmp_path / other)
    pandas.DataFrame({"_id": [name], "list": [["x", "y"]]}).to_parquet(tmp_path / name)
    assert list(rows(tmp_path / name)) == [(1, {"_id": name, "list": ["x", "y"]})]
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"cannot be read: .*No such file"):
        list(rows(tmp_path / name))


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd])
@pytest.mark.parametrize("name", ["a.JSONL.Zst", "a.jsonl.GZ", "a.jsonl.bz2", "a.xz", "a"])
def test_what_a_file_holds_says_how_it_is_compressed(compress, name, tmp_path):
    """Lines end with \\n or \\r\\n; other characters that end lines elsewhere are part of a text."""
    texts = [f"one{BREAKS}line", "two"]
    data = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False).replace("\\f", "\\u000c") for text in texts).encode()
    (tmp_path / name).write_bytes(compress(data))
    assert [row["text"] for _, row in rows(tmp_path / name)] == texts
    if compress is not bytes:
        (tmp_path / name).write_bytes(compress(os.urandom(2000).hex().encode())[:1500])
        with pytest.raises(DataError, match=r":1: the compressed file is damaged or cut off"):
            list(rows(tmp_path / name))


@pytest.mark.parametrize("name", ["T.TSV", "t.Csv", "t.tsv.BZ2"])
def test_endings_of_tables_in_any_case(name, tmp_path):
    delimiter = "," if "csv" in name.lower() else "\t"
    data = f"_id{delimiter}text\n1{delimiter}x{BREAKS}\n".encode()
    (tmp_path / name).write_bytes(bz2.compress(data) if name.endswith("BZ2") else data)
    assert list(rows(tmp_path / name)) == [(2, {"_id": "1", "text": f"x{BREAKS}"})]


def test_a_tsv_without_names_is_read_as_trec_has_it(tmp_path):
    path = tmp_path / "c.tsv"
    path.write_text('1\t"a mark that nobody closes\n\n2\tb\n')
    assert list(rows(path, ["id"])) == [(1, {"_id": "1", "text": '"a mark that nobody closes'}), (3, {"_id": "2", "text": "b"})]
    path.write_text("1\thttps://a\tA title\tthe body\n")  # as in msmarco-docs.tsv
    assert list(rows(path, ["id"])) == [(1, {"_id": "1", "url": "https://a", "title": "A title", "text": "the body"})]
    path.write_text("ID\ttext\n1\tb\n")
    assert list(rows(path, ["id"])) == [(2, {"ID": "1", "text": "b"})]
    for header in ("pmid\tabstract", "cord_uid\ttitle", "#id\ttext", "nr\tpassage", "node_id\tvalue", "topic\ttitle"):
        path.write_text(f"{header}\n1\tb\n")
        assert list(rows(path, ["id"])) == [(2, dict(zip(header.split("\t"), ("1", "b"), strict=True)))]
    for first in ("7\ttext", "a\tthe text of it", "d1\tid"):  # no names of columns
        path.write_text(f"{first}\n1\tb\n")
        assert len(list(rows(path, ["doc"]))) == 2


@pytest.mark.parametrize(
    "content, message",
    [
        ('id,text\n1,"never closed\n2,b\n', ":2: not a valid table"),
        ('id,text\n1,"closed" early\n', ":2: not a valid table"),
        ("id,text\n1,a\n\n2,b,c\n", ":4: 3 columns, but the first line has 2"),
        ("id,text\n1\n", ":2: 1 columns, but the first line has 2"),
        ("id,text,text\n1,a,b\n", ":1: two columns have the same name"),
    ],
)
def test_a_damaged_table_is_one_line(content, message, tmp_path):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        list(rows(tmp_path / "a.csv"))
    assert "\n" not in str(caught.value)


def test_half_a_character_is_replaced_and_said_once(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"_id": "whole \\ud83d\\ude00"}\n{"_id": "cut \\ud83d", "metadata": {"\\udc00": ["\\uDFFF"]}}\n{"_id": "\\ud83d"}\n'
    )
    assert [row for _, row in rows(path)] == [
        {"_id": "whole 😀"},
        {"_id": "cut \ufffd", "metadata": {"\ufffd": ["\ufffd"]}},
        {"_id": "\ufffd"},
    ]
    assert len(caplog.records) == 1
    assert "a.jsonl:2: a lone surrogate (half a character) is read as U+FFFD; rows with one: 2" in caplog.text
