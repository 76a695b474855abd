"""What a person reads: tables that keep their cells whole, words instead of pieces, numbers with their nouns."""

import re

import pytest
from rich.console import Console
from starlette.testclient import TestClient

from anysplade import Document, Hit, Index
from anysplade.cli import main
from anysplade.cli.rendering import hit_lines, table
from anysplade.cli.study import plan_lines
from anysplade.evaluation.runs import write_run
from anysplade.search.hits import TermMatch, join_matches, query_words
from anysplade.serving.app import create_app
from anysplade.serving.batching import Searcher
from anysplade.study.pipeline import PlannedRow, StudyPlan


def drawn(parts, width=200):
    console = Console(width=width, soft_wrap=True, markup=False, emoji=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return captured.get()


@pytest.mark.parametrize("columns", [80, 200])
def test_a_table_in_a_pipe_has_the_width_that_it_needs(columns, collection_folder, tmp_path, capsys, monkeypatch):
    """Three models, one with a long name, whatever the terminal is that the pipe was started in."""
    names = ["a-run-whose-name-has-many-more-characters-than-its-numbers.trec", "b.trec"]
    for name, shared in zip(names, (2, 3), strict=True):
        run = {f"q{i}": {f"d{i if i % shared else i + 1}": 1.0, "d39": 0.5} for i in range(20)}
        write_run(tmp_path / name, run, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["evaluate", "bm25", *names, str(collection_folder), "--metrics", "nDCG@10", "RR@10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"model +nDCG@10 +RR@10 +query active dims +document active dims +FLOPS", lines[0])
    assert [line.split()[0] for line in lines[1:4]] == ["bm25", *names]
    assert re.fullmatch(r"against bm25 +metric +difference +95 % +p +p, Holm +wins / ties / losses", lines[5])
    number = r"[\d.e-]+"
    for line, name, metric in zip(lines[6:10], names * 2, ["nDCG@10"] * 2 + ["RR@10"] * 2, strict=True):
        corrected = number if metric == "nDCG@10" else "–"
        span = r"[+-]\d\.\d{3} to [+-]\d\.\d{3}"
        row = rf"{re.escape(name)} +{metric} +[+-]\d\.\d{{3}} +{span} +{number} +{corrected} +\d+ / \d+ / \d+"
        assert re.fullmatch(row, line)
    assert "p, Holm: corrected for 2 comparisons in nDCG@10, the first metric" in lines[10]
    assert "exploratory: their p is not corrected" in lines[11]


@pytest.mark.parametrize("width", [20, 60, 120])
def test_a_narrow_table_breaks_headings_between_words_and_numbers_nowhere(width):
    rows = [["out/a/long/path/of/a/model", "-0.021 to +0.053", "1 / 2 / 3"], ["b", "+0.1 to +0.2", "10 / 0 / 0"]]
    lines = drawn([table(("against the first", "95 % interval", "wins / ties / losses"), rows)], width).splitlines()
    for row in rows:
        assert any(all(cell in line for cell in row[1:]) for line in lines)
    assert {"against", "first", "95", "interval", "losses"} <= {word for line in lines for word in line.split()}
    assert "out/a/long/path/of/a/model" in "".join(line.split()[0] for line in lines if not line.startswith(" "))


MATCHES = [
    TermMatch(*row)
    for row in (("lam", 1, 1, 1.0), ("flow", 1, 2, 2.5), ("##ina", 1, 1, 1.0), ("##r", 1, 1, 1.0), ("la", 1, 1, 0.5))
]


def test_the_pieces_of_a_word_are_shown_as_the_word():
    words = dict.fromkeys(("lam", "##ina", "##r"), "laminar")
    joined = join_matches(MATCHES, words)
    assert [(match.word, match.product) for match in joined] == [("laminar", 3.0), ("flow", 2.5), ("la", 0.5)]
    assert [term.term for term in joined[0].terms] == ["lam", "##ina", "##r"]
    hits = [
        Hit("d1", 6.0, "Pipes and\nplates", "What flows.", terms=MATCHES),
        Hit("d2", 1.0, "", "Text alone.", terms=MATCHES[1:2]),
    ]
    assert drawn(hit_lines(hits, words)).splitlines() == [
        " 1. d1  6.00  Pipes and plates",
        "    What flows.",
        "    laminar=3.00  flow 1.00×2.00=2.50  la 1.00×1.00=0.50",
        " 2. d2  1.00",
        "    Text alone.",
        "    flow 1.00×2.00=2.50",
    ]


def test_a_word_that_has_the_name_of_another_term_stays_apart():
    matches = [TermMatch("ab", 1, 1, 1.0), TermMatch("a", 1, 1, 1.0), TermMatch("##b", 1, 1, 1.0)]
    joined = join_matches(matches, {"a": "ab", "##b": "ab"})
    assert [(match.word, match.product, len(match.terms)) for match in joined] == [("ab", 2.0, 2), ("ab", 1.0, 1)]


def test_the_page_and_the_command_join_what_the_tokenizer_of_the_query_split(tmp_path, capsys):
    query = "laminarization of arrays"
    with Index.build("bert-tiny", {"1": Document("t", "laminarization"), "2": Document("", "arrays")}, tmp_path / "index") as index:
        words = query_words(index.queries, query)
        pieces = [term for term, word in words.items() if word == "laminarization"]
        hits = index.search(query, explain=True)
    assert len({match.term for match in hits[0].terms} & set(pieces)) > 1  # by term in Python and JSON
    joined = join_matches(hits[0].terms, words)
    assert sum(match.product for match in joined) == pytest.approx(hits[0].score)
    with TestClient(create_app(Searcher(tmp_path / "index")), base_url="http://localhost") as client:
        page = client.get("/", params={"q": query}).text
        shown = client.get("/terms", params={"text": query}).text
    for text in (page, shown):
        assert "<td>laminarization</td>" in text
        assert not any(f"<td>{piece}</td>" in text for piece in pieces)
    assert main(["search", str(tmp_path / "index"), query]) == 0
    out = capsys.readouterr().out
    assert "1  " in out
    assert not any(f"  {piece} " in out for piece in pieces)


@pytest.mark.parametrize(
    "done, seconds, end",
    [
        (0, None, "1 training, 0 of them done; 1 to run, 2 at a time; the time is known once one of each backbone is done"),
        (0, 120.0, "1 training, 0 of them done; 1 to run, 2 at a time, about 2 minutes"),
        (1, 0.0, "1 training, 1 of them done; 0 to run, 2 at a time"),
    ],
)
def test_a_plan_says_the_time_if_it_is_known(done, seconds, end):
    plan = StudyPlan([PlannedRow("norm", "bert", "raw", 1, done)], 1, done, 2, seconds)
    assert drawn(plan_lines(plan)).splitlines()[-1] == end


def test_the_tables_are_written_as_markdown(collection_folder, tmp_path, capsys):
    """The table of a paper; recalls at a depth that a ranking of all documents reaches are in the JSON alone."""
    run = tmp_path / "a|b.trec"
    write_run(run, {f"q{i}": {f"d{i + 1}": 1.0} for i in range(20)}, "run")
    for names, file in ((["bm25"], "evaluation"), (["bm25", str(run)], "evaluations")):
        assert main(["evaluate", *names, str(collection_folder), "--out", str(tmp_path / "out")]) == 0
        printed = capsys.readouterr().out
        written = (tmp_path / "out" / f"{file}.md").read_text()
        assert written.startswith("| model | nDCG@10 | RR@10 | query active dims | document active dims | FLOPS |\n| --- | ---: |")
        assert "R@100, R@1000: not shown, since it is 1 if a ranking has all documents" in printed
    assert re.search(rf"^\| {re.escape(str(run)).replace('[|]', '|')} \|".replace(r"a\|b", r"a\\\|b"), written, re.MULTILINE)
    assert "| against bm25 | metric | difference | 95 % | p | p, Holm | wins / ties / losses |" in written
    assert "changed most" in printed
    assert "changed most" not in written
    assert main(["evaluate", "bm25", str(collection_folder), "--metrics", "R@1000"]) == 0
    assert "R@1000" in capsys.readouterr().out.splitlines()[0]
