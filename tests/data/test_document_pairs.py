import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anysplade import DataError, Document, OptionError, OutputError, load_pairs, make_pairs
from anysplade.data.document_pairs import _unusable
from anysplade.data.sentences import sentence_pair
from anysplade.data.text import count_words

LAMPS = (
    "Lamps were lit along the harbour every evening. The keeper counted seventeen ships before midnight. Nobody slept much there."
)
BREAD = "Bread needs flour, water, salt and patience. A slow dough tastes better than a quick one. Bakers rise early in every town."
RIVER = "The river rises in cold northern mountains. Its water turns the wheels of eleven mills. Trout live below the last bridge."


def corpus_of(folder, *documents):
    """A corpus of (title, text) or texts, with the ids d0, d1, ..."""
    path = folder / "corpus.jsonl"
    titled = [document if isinstance(document, tuple) else ("", document) for document in documents]
    rows = ({"_id": f"d{i}", "title": title, "text": text} for i, (title, text) in enumerate(titled))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def made_of(folder, *documents, kinds=("title", "heading", "sentence")):
    """What is made of documents, and the rows."""
    made = make_pairs(corpus_of(folder, *documents), folder / "pairs.jsonl", kinds=kinds)
    return made, rows_of(folder / "pairs.jsonl")


def test_each_kind(tmp_path):
    text = f"# Harbour lights\n\n{LAMPS}\n\n## How the bread was made\n\n{BREAD}\n\n## See also\n\n{RIVER}\n"
    made, rows = made_of(tmp_path, ("Harbour lights", text), ("The river", RIVER))
    assert made.pairs == {"title": 2, "heading": 1, "sentence": 2}
    assert made.documents == 2
    assert made.left_out == {
        "document": {},
        "title": {},
        "heading": {"same_as_title": 1, "generic": 1, "without_heading": 1},
        "sentence": {},
    }
    title, heading, sentence, *_ = rows
    assert title == {"query": "Harbour lights", "positive": title["positive"], "kind": "title", "document_id": "d0"}
    assert title["positive"].startswith("Lamps were lit")  # without the title
    assert (heading["query"], heading["positive"]) == ("How the bread was made", BREAD)
    assert sentence["query"] in f"{LAMPS} {BREAD} {RIVER}"
    assert sentence["positive"].startswith("Harbour lights #")  # the document's full text, but for the sentence
    assert sentence["query"] not in sentence["positive"]
    assert [row["kind"] for row in made.examples] == ["title", "heading", "sentence"]
    assert [(pair.query, pair.positive) for pair in load_pairs(tmp_path / "pairs.jsonl")] == [
        (row["query"], row["positive"]) for row in rows
    ]


@pytest.mark.parametrize(
    "heading, body, reason",
    [
        ("Harbour", "lamp " * 8, ""),
        ("Harbour", "lamp " * 7, "text_too_short"),
        ("harbour " * 40, "lamp " * 8, ""),
        ("harbour " * 41, "lamp " * 8, "too_long"),
        ("Introduction:", "lamp " * 8, "generic"),
        ("3.14", "lamp " * 8, "generic"),
    ],
)
def test_what_is_no_heading_of_a_pair(heading, body, reason):
    assert _unusable(heading, body) == reason


def test_near_duplicates_give_no_pair(tmp_path):
    again = " ".join([*(f"{LAMPS} {BREAD} {RIVER}".replace("seventeen", "twelve")).split(), "\n"])
    made, rows = made_of(tmp_path, f"{LAMPS} {BREAD} {RIVER}", again, LAMPS.upper(), LAMPS, BREAD)
    assert made.left_out["document"] == {"near_duplicates": 2}
    assert [row["document_id"] for row in rows] == ["d0", "d2", "d4"]


def test_a_query_of_several_texts_is_left_out(tmp_path):
    made, rows = made_of(
        tmp_path, ("News", LAMPS), ("NEWS.", BREAD), ("Rivers", RIVER), ("Index", f"{LAMPS} {RIVER}"), kinds=["title"]
    )
    assert [row["query"] for row in rows] == ["Rivers"]
    assert made.left_out["title"] == {"generic": 1, "query_of_several_texts": 2}


def test_a_duplicate_takes_no_title_from_the_first(tmp_path):
    made, rows = made_of(tmp_path, ("The harbour", LAMPS), ("The harbour", LAMPS), kinds=["title"])
    assert [row["document_id"] for row in rows] == ["d0"]
    assert made.left_out["document"] == {"near_duplicates": 1}


def test_a_title_is_cut_off_only_where_it_stands_alone(tmp_path):
    paris = "Paris is the capital of France and its largest city by far."
    _, rows = made_of(
        tmp_path, ("Paris", paris), ("The harbour", f"The harbour. {LAMPS}"), ("Bread", f"Bread\n=====\n{BREAD}"), kinds=["title"]
    )
    assert [row["positive"] for row in rows] == [paris, LAMPS, BREAD]


def test_a_rerun_makes_nothing_again_and_another_output_is_refused(tmp_path, monkeypatch):
    made, _ = made_of(tmp_path, ("The harbour", LAMPS), ("Bread", BREAD))
    output, record = tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl.json"
    assert json.loads(record.read_text()) == made.to_dict()
    before = output.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("anysplade.data.document_pairs._pairs", None)
        again = make_pairs(str(tmp_path / "corpus.jsonl"), output, kinds=("sentence", "title", "heading"))
    assert (again.to_dict(), output.stat().st_mtime_ns) == (made.to_dict(), before)
    with pytest.raises(OutputError, match="choose another"):
        make_pairs(str(tmp_path / "corpus.jsonl"), output, kinds=["title"])
    corpus_of(tmp_path, RIVER)
    with pytest.raises(OutputError, match="choose another"):
        make_pairs(str(tmp_path / "corpus.jsonl"), output)
    with pytest.raises(OutputError, match="choose another"):  # the corpus itself
        make_pairs(str(tmp_path / "corpus.jsonl"), tmp_path / "corpus.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "pairs.jsonl", "pairs.jsonl.json"]


def test_the_same_pairs_in_another_process(tmp_path):
    _, rows = made_of(tmp_path, ("The harbour", LAMPS), BREAD, RIVER, f"{RIVER} {BREAD}", f"{RIVER} Yes. {BREAD}")
    code = "import sys, anysplade; anysplade.make_pairs(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, tmp_path / "corpus.jsonl", tmp_path / "again.jsonl"], check=True)
    assert rows_of(tmp_path / "again.jsonl") == rows


@pytest.mark.parametrize(
    "documents, kinds, message",
    [
        ([LAMPS, BREAD], ["title"], r"none of 2 documents gave a pair \(without title: 2\); try other `kinds`: heading, sentence"),
        (
            ["too short", "", "🎉🎉"],
            ["title", "heading", "sentence"],
            r"without text: 2, without title: 1, .*; give a corpus with titles",
        ),
        ([("Kabel", "kabel")], ["title"], "text too short: 1"),
        (
            [("Kabel lodan", ""), ("Mifil", " ")],
            ["title"],
            r"\(without text: 2\); give documents with texts; titles alone are not enough",
        ),
        ([], ["title"], "the corpus is empty"),
    ],
)
def test_no_pair_at_all(documents, kinds, message, tmp_path):
    with pytest.raises(DataError, match=message) as raised:
        made_of(tmp_path, *documents, kinds=kinds)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize("kinds", [[], ["titel"], ["title", "titel"], "title"])
def test_unknown_kinds(kinds, tmp_path):
    with pytest.raises(OptionError, match="choose from title, heading, sentence"):
        made_of(tmp_path, LAMPS, kinds=kinds)


def test_texts_that_could_break_something(tmp_path):
    words = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}" for i in range(100_000))
    made, rows = made_of(
        tmp_path,
        ("A\x00 title\ud83d", f"{LAMPS}\x00"),
        ("Long", words),
        ("🎉", "🎉 " * 50),
        ("Again and again", "This is the same sentence. " * 20_000),
        ("Headings", "<h1>" * 10_000 + "# \n" * 10_000 + "# " * 10_000 + "x\n" + BREAD),
        ("Spaces", f"{' ' * 50_000}{RIVER}{chr(10) * 50_000}"),
    )
    assert made.pairs["title"] >= 4
    assert not any("This is the same sentence" in row["query"] for row in rows)
    assert len(load_pairs(tmp_path / "pairs.jsonl")) == len(rows)
    assert len(Path(tmp_path / "pairs.jsonl.json").read_text()) < 10_000


def test_a_duplicate_id_is_named(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"_id": "a", "text": LAMPS}) + "\n" + json.dumps({"_id": "a", "text": BREAD}))
    with pytest.raises(DataError, match=r"corpus\.jsonl:2: the id 'a' is a duplicate"):
        make_pairs(str(tmp_path / "corpus.jsonl"), tmp_path / "pairs.jsonl")


WORD = st.sampled_from(
    ["ships", "Harbour", "the", "of", "grün", "x", "3.14", "e.g.", "f(x)", "東京", "都市は", "กรุง", "हिन्दी", "🎉", "\x00"]
)
MARK = st.sampled_from([". ", " ", ", ", "! ", "。", "\n", "\n\n", "\n- ", ' """', "? "])
TEXT = st.lists(st.tuples(WORD, MARK), max_size=80).map(lambda parts: "".join(word + mark for word, mark in parts)) | st.text(
    max_size=200
)


@settings(max_examples=300, deadline=None)
@given(TEXT, TEXT, st.text(max_size=5))
def test_the_sentence_is_not_in_the_positive(title, text, id_):
    found = sentence_pair(id_, Document(title, text))
    assert found == sentence_pair(id_, Document(title, text))
    if found:
        query, positive = found
        assert query not in " ".join(positive.split())
        assert query in " ".join(text.split())
        assert count_words(positive) >= 8


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6))
def test_whatever_is_made_can_be_read(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("any")
    documents = [(title.encode(errors="replace").decode(), text.encode(errors="replace").decode()) for title, text in documents]
    try:
        made, rows = made_of(folder, *documents)
    except DataError:
        return
    assert sum(made.pairs.values()) == len(rows) == len(load_pairs(folder / "pairs.jsonl"))
    assert len({row["query"] for row in rows}) == len(rows)
