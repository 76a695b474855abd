import gzip

import pytest

from anysplade import Collection, DataError, Document, load_collection, load_queries


@pytest.mark.parametrize(
    "name, content",
    [
        (
            "topics.xml",
            '<?xml version="1.0"?>\n<topics task="x"><topic number="1"><query>AT&amp;T &#233;</query><q/></topic></topics>',
        ),
        ("topics.XML", "<topics><topic number='1'> AT&amp;T <!-- no --> &eacute;\n</topic></topics>"),
        ("queries.xml", "<topics><topic><num>1</num><title>AT&amp;T <i>é</i></title><desc>no</desc></topic></topics>"),
        (
            "topics.xml",
            '<web><topic number="1" type="x"><query><![CDATA[AT&T é]]></query><subtopic number="2">no</subtopic></topic></web>',
        ),
        ("topics.txt", "<top>\n<num> Number: 1\n<title> Topic: AT&amp;T &eacute;\n<desc> Description:\nno\n</top>\n"),
        ("topics.trec.gz", "<top><num>1</num><query>AT&amp;T é</query></top>"),
    ],
)
def test_topics_in_sgml_and_xml(name, content, tmp_path):
    (tmp_path / "docs.tsv").write_text("a\thttp://a\tT\tone\n")
    (tmp_path / "qrels.txt").write_text("1 0 a 1\n")
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    expected = Collection(tmp_path.name, {"a": Document("T", "one")}, {"1": "AT&T é"}, {"1": {"a": 1}})
    assert load_collection(tmp_path) == expected
    for wrong, message in (
        ("<topics><topic number='1'><x>y</x></topic></topics>", "a topic without a number"),
        (content * 2, "duplicate"),
    ):
        (tmp_path / name).write_text(wrong)
        with pytest.raises(DataError, match=message):
            load_collection(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            '<topics><topic number="1"><query>one</query></topic><topic number="2"><query>tw',
            "2 topics begin and 1 end; the file is cut",
        ),
        ('<!DOCTYPE t [<!ENTITY f "b">]><t><topic number="1"><query>&f;</query></topic></t>', "declares entities of its own"),
    ],
)
def test_topics_that_would_be_misread_are_refused(content, message, tmp_path):
    (tmp_path / "topics.xml").write_text(content)
    with pytest.raises(DataError, match=message):
        load_queries(tmp_path / "topics.xml")
