import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anysplade import DataError, Document, OptionError, OutputError, load_pairs, make_pairs
from anysplade.data.document_pairs import KINDS, _NearDuplicates, _sentences

LONG = "The quick fox jumps over a lazy dog in the park. It was seen by a man who sold bread there. Nobody else came by that day."


def corpus(folder, documents):
    """A corpus of (title, text) pairs or texts."""
    rows = [document if isinstance(document, tuple) else ("", document) for document in documents]
    lines = (json.dumps({"_id": f"d{i}", "title": title, "text": text}) + "\n" for i, (title, text) in enumerate(rows))
    (folder / "corpus.jsonl").write_text("".join(lines))
    return str(folder / "corpus.jsonl")


def made(folder, documents, **options):
    result = make_pairs(corpus(folder, documents), folder / "pairs.jsonl", **options)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(result.pairs.values()) == len(rows)
    assert all(example in rows for example in result.examples)
    return result, rows


PAGE = f"""{LONG}

# How foxes *sleep*

Foxes sleep in the open most of the year, and curl up.

What they eat
=============
They eat mice, berries and whatever else a garden has to offer.
<h2>Where &amp; when</h2>
All over the world and at any time of a day."""


def test_each_kind(tmp_path):
    other = LONG.replace("fox", "baker").replace("dog", "oven") + " So it is."
    result, rows = made(tmp_path, [("On foxes", PAGE), ("On bread", other)])
    assert result.pairs == {"title": 2, "heading": 3, "sentence": 2}
    by_query = {row["query"]: row for row in rows}
    assert by_query["On bread"]["positive"].startswith("The quick baker")
    assert by_query["How foxes sleep"]["positive"] == "Foxes sleep in the open most of the year, and curl up."
    assert by_query["What they eat"]["positive"].startswith("They eat mice")
    assert by_query["Where & when"]["positive"].startswith("All over the world")
    for row in rows:
        assert row["document_id"] in ("d0", "d1")
        if row["kind"] == "sentence":
            assert row["query"] not in row["positive"]
            assert row["positive"].startswith("On ")
    pairs = load_pairs(tmp_path / "pairs.jsonl")
    assert [(pair.query, pair.positive) for pair in pairs] == [(row["query"], row["positive"]) for row in rows]
    assert (tmp_path / "pairs.jsonl.json").is_file()


def test_the_kinds_that_are_asked_for(tmp_path):
    result, rows = made(tmp_path, [("On foxes", LONG)], kinds=["title"])
    assert result.pairs == {"title": 1}
    assert {row["kind"] for row in rows} == {"title"}


def test_text_without_sentences_gives_words_in_a_row(tmp_path):
    words = " ".join(f"word{chr(97 + i)}" for i in range(26))
    (row,) = made(tmp_path, [words])[1]
    assert row["query"] in words
    assert 6 <= len(row["query"].split()) <= 15
    assert set(row["query"].split()) | set(row["positive"].split()) == set(words.split())
    assert not set(row["query"].split()) & set(row["positive"].split())


def test_scripts_without_spaces(tmp_path):
    (row,) = made(tmp_path, [("", "信息检索是计算机科学的一个分支。它研究如何从大量文本中找到需要的内容。人们每天都在使用它。")])[1]
    assert 5 <= len(row["query"]) <= 40
    assert row["query"] not in row["positive"]


CODE = """\
def invert(matrix, tolerance=1e-9):
    \'\'\'Compute the inverse of a square matrix.\'\'\'
    return [[row[i] for row in matrix] for i in range(3)]"""


def test_code_gives_its_language(tmp_path):
    (row,) = made(tmp_path, [CODE])[1]
    assert row["query"] == "Compute the inverse of a square matrix."
    assert "def invert" in row["positive"]


def test_near_duplicates_and_ambiguous_titles_are_left_out(tmp_path):
    other = "Bread is made of flour and water, and it takes a night to rise. Bakers get up early for that reason alone."
    result, rows = made(tmp_path, [("Introduction", LONG), ("introduction!", other), ("Foxes", LONG.replace("bread", "bread,"))])
    assert result.near_duplicates == 1
    assert result.ambiguous == 2
    assert {row["document_id"] for row in rows} == {"d0", "d1"}
    assert {row["kind"] for row in rows} == {"sentence"}


def test_again_it_is_the_same_and_not_made_twice(tmp_path):
    documents = [("On foxes", LONG), LONG.upper().replace("FOX", "HEN").replace("MAN", "CAT").replace("DAY", "AGE")]
    first, _ = made(tmp_path, documents)
    content = (tmp_path / "pairs.jsonl").read_bytes()
    time = (tmp_path / "pairs.jsonl").stat().st_mtime_ns
    assert made(tmp_path, documents)[0] == first
    assert (tmp_path / "pairs.jsonl").stat().st_mtime_ns == time
    with pytest.raises(OutputError, match="choose another"):
        made(tmp_path, documents, kinds=["title"])
    with pytest.raises(OutputError, match="choose another"):
        made(tmp_path, documents[:1])
    (tmp_path / "other.jsonl").write_text("something else\n")
    with pytest.raises(OutputError, match="choose another"):
        make_pairs(str(tmp_path / "corpus.jsonl"), tmp_path / "other.jsonl")
    assert (tmp_path / "other.jsonl").read_text() == "something else\n"
    make_pairs(corpus(tmp_path, documents), tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    "documents, message",
    [
        ([""], "too short"),
        (["🙂🙂🙂 🙂"], "too short"),
        ([("Title", "Title")], "too short"),
        ([("Same", f"{a} b c d e f g h i j") for a in "xyz"], "too short|same queries"),
        ([], "the corpus is empty"),
    ],
)
def test_nothing_to_make(tmp_path, documents, message):
    with pytest.raises(DataError, match=message):
        make_pairs(corpus(tmp_path, documents), tmp_path / "pairs.jsonl", kinds=["title"])
    assert not (tmp_path / "pairs.jsonl").exists()


def test_unknown_kinds(tmp_path):
    for kinds in (["titles"], []):
        with pytest.raises(OptionError, match="choose from title, heading, sentence"):
            make_pairs(corpus(tmp_path, [LONG]), tmp_path / "pairs.jsonl", kinds=kinds)


def test_hostile_texts(tmp_path):
    documents = ["half \ud83d a " + LONG, "word " * 100_000 + "end", "\0" * 50, "#" * 5000 + "\n" + "=" * 5000, ("=", "-\n" * 300)]
    result, rows = made(tmp_path, documents)
    assert result.documents == 5
    assert any("\ufffd" in row["query"] + row["positive"] for row in rows)


@given(st.text(max_size=400), st.sampled_from(["", "A title"]))
def test_a_sentence_and_its_rest_have_all_words(text, title):
    for row in _sentences("id", Document(title, text)):
        rest = f"{title} {text}".split()
        assert (
            sorted("".join(f"{row.query}{row.positive}".split()).strip("\"'")) <= sorted("".join(rest)) or "\ufffd" in row.positive
        )
        assert len("".join(row.query.split())) + len("".join(row.positive.split())) <= len("".join(rest)) + 2


@given(st.lists(st.sampled_from("abcdefgh"), min_size=40, max_size=80), st.integers(0, 39))
def test_a_text_is_its_own_near_duplicate(words, start):
    seen = _NearDuplicates()
    assert not seen.has(" ".join(words))
    assert seen.has("  ".join(words).upper())
    assert not seen.has(" ".join(f"other{word}{i}" for i, word in enumerate(words)))
    assert set(KINDS) == {"title", "heading", "sentence"}
