import logging

import pytest

from anysplade._common import progress


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "1 second"), (1, "1 second"), (40, "40 seconds"), (89, "89 seconds"), (91, "2 minutes"), (1020, "17 minutes"),
     (5399, "90 minutes"), (5400, "1.5 hours"), (7200, "2 hours"), (86400, "24 hours")],
)  # fmt: skip
def test_durations_are_as_a_person_says_them(seconds, text):
    assert progress.duration(seconds) == text


@pytest.mark.parametrize(
    "count, unit, text",
    [(1, "seed", "1 seed"), (3, "seed", "3 seeds"), (0, "hit", "0 hits"), (1240, "query", "1,240 queries"), (1, "query", "1 query"),
     (2, "process", "2 processes")],
)  # fmt: skip
def test_a_number_stands_with_its_noun(count, unit, text):
    assert progress.counted(count, unit) == text


def test_where_nobody_watches_a_line_comes_now_and_then(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "anysplade")
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with progress.bar("encoding documents", "document", 1000, show=True) as bar:
        for _ in range(50):  # 20 documents in 2 s
            now[0] += 2
            bar.update(20)
    assert caplog.messages[0] == "encoding documents: 1,000 documents"
    assert caplog.messages[1] == "encoding documents: 80 of 1,000 documents, about 2 minutes left"
    assert len(caplog.messages) == 5  # at once, and 6, 36, 66 and 96 s after the first documents
    caplog.clear()
    with progress.bar("reading", "file", show=True) as bar:
        for _ in range(2):
            now[0] += 10
            bar.update(3)
    assert caplog.messages == ["reading: 6 files"]
    caplog.clear()
    with progress.bar("encoding queries", "query", 12, show=True) as bar:
        for _ in range(2):
            now[0] += 10
            bar.update(3)
    assert caplog.messages == ["encoding queries: 6 of 12 queries, about 20 seconds left"]


def test_nothing_is_said_unless_asked_for(monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO, "anysplade")
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with progress.bar("encoding", "text", 10) as bar:
        now[0] += 100
        bar.update(5)
    assert not caplog.messages
    assert capsys.readouterr() == ("", "")
