import contextlib
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import qdrant_edge
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import anysplade.search.store
from anysplade import AnyspladeError, DataError, Document, OptionError, OutputError
from anysplade.search.documents import EncodedDocument
from anysplade.search.filters import explain_filter
from anysplade.search.store import Store
from processes import drop_privileges, preloaded_context

VOCABULARY = 250_002  # XLM-R's
IDS = [" ", "a", "b c", "ü/..\\x00", "😀", "-1", "9" * 5000, "\udc80"]


def encoded(id_, vector, text="", metadata=None):
    terms = np.array(sorted(vector), np.int32)
    return EncodedDocument(
        id_, Document("", text, metadata), terms, np.array([vector[term] for term in terms.tolist()], np.float32)
    )


@pytest.fixture
def store(tmp_path):
    Store.create(tmp_path / "store")
    store = Store(tmp_path / "store", VOCABULARY)
    yield store
    store.close()


vectors = st.dictionaries(st.sampled_from([0, 1, 5, 149, 250_001]), st.integers(1, 8).map(lambda i: i / 4), max_size=5)


class AgainstADictionary(RuleBasedStateMachine):
    """Any series of changes: the store holds and finds what a dictionary and the exact product say."""

    def __init__(self):
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.folder = Path(self.place.name) / "store"
        Store.create(self.folder)
        self.store = Store(self.folder, VOCABULARY)
        self.held = {}

    @rule(
        batch=st.dictionaries(
            st.sampled_from(IDS), st.tuples(vectors, st.sampled_from([None, {"l": "x"}, {"l": "y", "n": 1}])), max_size=4
        )
    )
    def put(self, batch):
        self.store.put([encoded(id_, vector, "text", metadata) for id_, (vector, metadata) in batch.items()])
        self.held |= batch

    @rule(ids=st.lists(st.sampled_from(IDS), max_size=3))
    def delete(self, ids):
        assert self.store.delete(ids) == len({id_ for id_ in ids if id_ in self.held})
        for id_ in ids:
            self.held.pop(id_, None)

    @rule()
    def open_again(self):
        self.store.close()
        self.store = Store(self.folder, VOCABULARY)

    @rule()
    def rebuild(self):
        self.store.rebuild()

    @rule(query=vectors, k=st.integers(1, 10), value=st.sampled_from([None, "x", ["x", "y"]]), exact=st.booleans())
    def search(self, query, k, value, exact):
        expected = {}
        for id_, (vector, metadata) in self.held.items():
            score = sum(weight * vector.get(term, 0) for term, weight in query.items())
            values = value if isinstance(value, list) else [value]
            if score > 0 and (value is None or (metadata or {}).get("l") in values):
                expected[id_] = score
        wanted = None if value is None else {"l": value}
        question = encoded("", query)
        if wanted and not any(metadata for _, metadata in self.held.values()):
            with pytest.raises(OptionError, match="no document has this name"):
                self.store.search(question.terms, question.weights, k, wanted, exact)
            return
        found = self.store.search(question.terms, question.weights, k, wanted, exact)
        scores = [score for _, score in found]
        assert scores == pytest.approx(sorted(expected.values(), reverse=True)[:k])  # of equal ones any may be the last
        for id_, score in zip(self.store.ids([position for position, _ in found]), scores, strict=True):
            assert expected[id_] == pytest.approx(score)

    @invariant()
    def holds_what_was_put(self):
        assert len(self.store) == len(self.held)
        assert {
            document.id: (dict(zip(document.terms.tolist(), document.weights.tolist(), strict=True)), document.content.metadata)
            for document in self.store
        } == self.held

    def teardown(self):
        self.store.close()
        self.place.cleanup()


class TestAgainstADictionary(AgainstADictionary.TestCase):
    settings = settings(max_examples=8, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
class TestTenThousandChanges(AgainstADictionary.TestCase):
    """A minute: the same for longer."""

    settings = settings(max_examples=250, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize(
    "terms, weights, message",
    [
        ([1, 2], [1.0], r"terms \(2,\) and weights \(1,\)"),
        ([1, 1], [1.0, 2.0], "rising and each once"),
        ([2, 1], [1.0, 2.0], "rising and each once"),
        ([1], [float("nan")], "finite and above 0"),
        ([1], [float("inf")], "finite and above 0"),
        ([1], [-1.0], "finite and above 0"),
        ([1], [0.0], "finite and above 0"),
        ([-1], [1.0], "0 or more"),
        ([250_002], [1.0], "outside of the vocabulary"),
    ],
)
def test_vectors_that_would_spoil_the_engine(terms, weights, message, store):
    good = encoded("good", {1: 1.0})
    bad = EncodedDocument("bad", Document("", ""), np.array(terms, np.int32), np.array(weights, np.float32))
    with pytest.raises(DataError, match=f"document 'bad': .*{message}"):
        store.put([good, bad])
    assert len(store) == 0  # of a batch all or nothing
    with pytest.raises(DataError, match=f"the query: .*{message}"):
        store.search(bad.terms, bad.weights, 10)
    store.put([good])
    assert store.search(good.terms, good.weights, 10) == [(1, 1.0)]


FILTERED = {
    "year": {"v": 2024},
    "year as a float": {"v": 2024.0},
    "year as a text": {"v": " 2024"},
    "zeros": {"v": "007"},
    "seven": {"v": 7},
    "half": {"v": 1.5},
    "version": {"v": "1.50"},
    "true": {"v": True},
    "false": {"v": False},
    "one": {"v": 1},
    "text of true": {"v": "TRUE"},
    "list": {"v": ["Straße", True, None]},
    "accent": {"v": "caf\u00e9"},
    "nested": {"deep": {"v": {"w": "x"}, "list": [{"w": "y"}, {"w": ["z", 3]}]}},
    "dotted": {"deep.v": {"w": "X "}, "v=w": "u"},
    "large": {"v": 10**30},
    "surrogate": {"half \ud800": "\udfff"},
    "none": {"v": None},
    "without": None,
}


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("v", 2024, "year, year as a float, year as a text"),
        ("v", "2024", "year, year as a float, year as a text"),
        ("v", "2024.0", "year as a float"),
        ("v", "007", "zeros"),
        ("v", 7, "seven"),
        ("v", "7", "seven"),
        ("v", 1.5, "half"),
        ("v", "1.50", "version"),
        ("v", True, "true, text of true, list"),
        ("v", "true ", "true, text of true, list"),
        ("v", "False", "false"),
        ("v", 1, "one"),
        ("v", "STRASSE", "list"),
        ("v", "CAFE\u0301", "accent"),
        ("V ", "strasse", "list"),
        ("v", [7, "no", "caf\u00e9"], "seven, accent"),
        ("deep.v.w", "x", "nested, dotted"),
        ("deep.list.w", 3, "nested"),
        ("deep.list.w", "Y", "nested"),
        ("v=w", "u", "dotted"),
        ("v", 10**30, "large"),
        ("half \ud800", "\udfff", "surrogate"),
    ],
)
def test_a_filter_means_what_a_person_means(name, value, expected, filtered):
    for exact in (False, True):
        assert filtered(exact, {name: value}) == expected.split(", ")


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filtered") / "store"
    Store.create(folder)
    store = Store(folder, VOCABULARY)
    store.put([encoded(id_, {3: 1.0}, metadata=metadata) for id_, metadata in FILTERED.items()])

    def found(exact, filter):
        return store.ids([position for position, _ in store.search(np.array([3]), np.array([1.0], np.float32), 99, filter, exact)])

    found.store = store
    yield found
    store.close()


@pytest.mark.parametrize("here", [True, False])
def test_a_filter_that_nothing_can_match_is_explained(here, filtered, monkeypatch):
    if not here:  # as in a process that may not write
        monkeypatch.setattr(filtered.store, "_engine", None)
    names = "names there: v, .*deep.v.w"
    for name in ("none", "deep", "deep.v", "title", "v.w"):
        with pytest.raises(OptionError, match=f"filter '{name}': no document has this name in its \"metadata\"; {names}"):
            filtered(False, {"v": 7, name: "x"})
    assert filtered(False, {"v": ["8", 9]}) == []
    assert explain_filter(filtered.store, {"v": ["8", 9]}) == "no document has v=8 or v=9"
    assert explain_filter(filtered.store, {}) is None
    matched = [hit for hit in ({"v": 7}, {"deep.v.w": "x"}) if filtered(False, hit)]
    assert len(matched) == 2
    together = {"v": [8, 7], "deep.v.w": "x"}
    said = explain_filter(filtered.store, together)
    if filtered(False, together):
        assert said == "no document with v=8 or v=7 and deep.v.w=x shares a term with the query"
    else:
        assert said == "no document has v=8 or v=7 and deep.v.w=x together"
    assert explain_filter(filtered.store, {"v": 7}) == "no document with v=7 shares a term with the query"
    for wrong in ({"v": None}, {"v": []}, {"v": {"a": 1}}, {"v": [["a"]]}, {"": 1}):
        with pytest.raises(OptionError, match="each a text, a number or a bool"):
            filtered(False, wrong)


def test_large_texts_and_empty_vectors(store):
    text = "ü" * 10_000_000
    store.put([encoded("large", {3: 1.0}, text), encoded("empty", {})])
    (document,) = store.documents([position for position, _ in store.search(np.array([3]), np.array([1.0], np.float32), 5)])
    assert document.content.text == text
    assert len(store) == 2
    assert store.search(np.array([], np.int32), np.array([], np.float32), 5) == []


SECOND = """
import sys, numpy as np
from pathlib import Path
from anysplade import OutputError
from anysplade.search.store import Store
store = Store(Path(sys.argv[1]), 250_002)
print(store.search(np.array([3]), np.array([1.0], np.float32), 5))
try:
    store.delete(["a"])
except OutputError as error:
    print(error)
"""


def test_a_second_process_reads_exactly_and_may_not_write(store):
    store.put([encoded("a", {3: 2.0})])
    said = subprocess.run([sys.executable, "-c", SECOND, str(store.folder)], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[0] == "[(1, 2.0)]"
    assert "another process holds this index; close it" in said.splitlines()[1]
    store.put([encoded("b", {3: 1.0})])  # and was not disturbed
    assert len(store.search(np.array([3]), np.array([1.0], np.float32), 5)) == 2


READ_ONLY = """
import sys, numpy as np
from pathlib import Path
from anysplade import AnyspladeError
from anysplade.search.store import Store
for folder in sys.argv[1:]:
    try:
        store = Store(Path(folder), 250_002)
        print(store.search(np.array([3]), np.array([1.0], np.float32), 5), flush=True)
        sys.stdin.readline()
        print(store.search(np.array([3]), np.array([1.0], np.float32), 5), flush=True)
    except AnyspladeError as error:
        print(error, flush=True)
"""


def test_a_store_that_may_not_be_written(store, tmp_path):
    store.put([encoded("a", {3: 2.0})])
    for name in ("crashed", "copied in part"):
        # While it is open: what was put is not in the file itself yet. The engine's temporary files may vanish meanwhile.
        shutil.copytree(store.folder, tmp_path / name, ignore=shutil.ignore_patterns("tmp-*"))
    (tmp_path / "copied in part" / "documents.sqlite-shm").unlink()
    store.close()
    folders = store.folder.rename(tmp_path / "100% closed?"), tmp_path / "crashed", tmp_path / "copied in part"
    for folder in folders:
        subprocess.run(["chmod", "-R", "a-w", folder], check=True)
    command = [sys.executable, "-c", READ_ONLY, *map(str, folders)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=drop_privileges, **pipes) as process:
        assert process.stdout.readline() == "[(1, 2.0)]\n"
        subprocess.run(["chmod", "-R", "u+w", folders[0]], check=True)
        writer = Store(folders[0], VOCABULARY)
        writer.put([encoded("b", {3: 1.0})])
        writer.close()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "[(1, 2.0), (2, 1.0)]\n"  # noticed, though SQLite was told that nobody writes
        process.stdin.write("\n")
        process.stdin.close()
        rest = process.stdout.read().splitlines()  # not communicate(), which passes over lines that are buffered already
    assert rest[:2] == ["[(1, 2.0)]", "[(1, 2.0)]"]
    assert rest[2].endswith("its last changes are still in documents.sqlite-wal; open it once where it can be written")
    for folder in folders:
        subprocess.run(["chmod", "-R", "u+w", folder], check=True)


def test_what_a_crash_left_undone_is_done(store):
    """The truth has it, the engine not yet: as if the process was killed between the two."""
    store.put([encoded("a", {3: 2.0}), encoded("gone", {3: 5.0})])
    apply, store._apply = store._apply, lambda rows: None
    store.put([encoded("b", {3: 1.0})])
    store.delete(["gone"])
    store._apply, store._flush = apply, lambda: None  # nor are the notes taken away
    store.close()
    again = Store(store.folder, VOCABULARY)
    assert again.ids([position for position, _ in again.search(np.array([3]), np.array([1.0], np.float32), 5)]) == ["a", "b"]
    again.close()


@pytest.mark.parametrize("closed", [True, False])  # False: killed, before the engine was flushed and after
def test_an_older_database_beside_a_newer_engine(closed, store, tmp_path, caplog):
    """As after a power cut on a disk that lost the database's last writes, or where a copy was put back."""
    store.put([encoded("same", {3: 1.0}), encoded("replaced", {3: 2.0}, "old", {"v": "old"}), encoded("deleted", {3: 3.0})])
    store.snapshot(tmp_path / "older")
    store.put([encoded("replaced", {3: 5.0}, "new", {"v": "new"}), encoded("added", {3: 6.0})])
    store.delete(["deleted"])
    if closed:
        store.close()
    else:
        store._engine.flush()
        store._close_engine()
    for path in store.folder.glob("documents.sqlite*"):
        path.unlink()
    shutil.copy(tmp_path / "older" / "documents.sqlite", store.folder)
    again = Store(store.folder, VOCABULARY)
    assert "the engine has changes that the database lacks; made again" in caplog.text
    query = np.array([3]), np.array([1.0], np.float32), 10
    assert again.search(*query) == again.search(*query, exact=True) == [(3, 3.0), (2, 2.0), (1, 1.0)]
    assert [document.id for document in again.documents([3, 2, 1])] == ["deleted", "replaced", "same"]
    assert again.search(*query, {"v": "old"}) == [(2, 2.0)]
    again.put([encoded("added", {3: 4.0})])
    again.close()
    caplog.clear()
    with_all = Store(store.folder, VOCABULARY)
    assert with_all.search(*query) == [(4, 4.0), (3, 3.0), (2, 2.0), (1, 1.0)]
    assert not caplog.text
    with_all.close()


def test_the_database_is_on_the_disk_before_the_engine_changes(store):
    assert store._database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    seen = []
    apply = store._apply

    def look(rows):
        with contextlib.closing(sqlite3.connect(store.folder / "documents.sqlite")) as other:  # which sees what is committed
            seen.extend(id_ for (id_,) in other.execute("SELECT id FROM ids"))
        apply(rows)

    store._apply = look
    store.put([encoded("a", {3: 1.0})])
    assert seen == ["a"]


def test_an_engine_of_an_earlier_version_is_made_again(store, caplog):
    """It has no tags."""
    store.put([encoded("a", {3: 1.0}, metadata={"lang": "en"})])
    store._engine.update(qdrant_edge.UpdateOperation.delete_points([0]))
    store._engine.update(qdrant_edge.UpdateOperation.clear_payload([1]))
    store._database.execute("DROP TABLE writes")
    store.close()
    again = Store(store.folder, VOCABULARY)
    assert "the engine was made by an earlier version; made again" in caplog.text
    assert again.search(np.array([3]), np.array([1.0], np.float32), 5, {"lang": "EN"}) == [(1, 1.0)]
    again.close()


@pytest.mark.parametrize("exact", [False, True])
def test_what_was_found_can_be_fetched_while_it_is_deleted(exact, store):
    """By another thread, and for exact searches by another process."""
    query = np.array([3]), np.array([1.0], np.float32), 10, None, exact
    store.put([encoded("a", {3: 1.0})])
    with store.reading():
        found = store.search(*query)
        deleting = threading.Thread(target=store.delete, args=(["a"],))
        deleting.start()
        if exact:
            with contextlib.closing(sqlite3.connect(store.folder / "documents.sqlite")) as other, other:
                other.executescript("DELETE FROM ids; DELETE FROM contents")
        deleting.join(0.1)
        assert [document.id for document in store.documents([position for position, _ in found])] == ["a"]
    deleting.join()
    assert store.search(*query) == []


class Failing:
    """The store's engine, which fails at its next change."""

    def __init__(self, engine, failure):
        self.engine, self.failure = engine, failure

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def update(self, operation):
        raise self.failure


@pytest.mark.parametrize(
    "failure, said", [(Exception("Service runtime error: No space left"), AnyspladeError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_change_that_the_engine_did_not_get_reaches_it_later(failure, said, store, monkeypatch):
    monkeypatch.setattr("anysplade.search.store._FLUSH", 2)
    store.put([encoded("a", {3: 3.0})])
    store._engine = Failing(store._engine, failure)
    with pytest.raises(said):
        store.put([encoded("b", {3: 2.0})])
    query = np.array([3]), np.array([1.0], np.float32), 5
    assert store.search(*query) == [(1, 3.0), (2, 2.0)]  # from the truth
    for i in range(4):  # and the notes of what is in the engine are taken away
        store.put([encoded(f"c{i}", {4: 1.0})])
    assert store._engine is not None
    assert store.search(*query) == [(1, 3.0), (2, 2.0)]


def test_a_disk_that_is_almost_full(store, monkeypatch):
    store.put([encoded("a", {3: 3.0})])
    monkeypatch.setattr("anysplade.search.store._FREE", 2**60)
    for change in (lambda: store.put([encoded("b", {3: 2.0})]), lambda: store.delete(["a"]), store.optimize, store.rebuild):
        with pytest.raises(AnyspladeError, match="make room"):
            change()
    assert store.search(np.array([3]), np.array([1.0], np.float32), 5) == [(1, 3.0)]


def test_a_new_engine_gets_all_however_many(store, monkeypatch):
    """More than are made safe at a time: once, the notes of all were taken away with the first of them."""
    monkeypatch.setattr("anysplade.search.store.BATCH", 8)
    monkeypatch.setattr("anysplade.search.store._FLUSH", 16)
    store.put(encoded(f"d{i}", {3: 1.0 + i}) for i in range(100))
    store.rebuild()
    assert len(store.search(np.array([3]), np.array([1.0], np.float32), 200)) == 100


def _change(folder, seed, begun):
    """Adds, replaces, empties and deletes, at times tidies, for as long as it lives."""
    anysplade.search.store._FLUSH = 300
    generator = random.Random(seed)
    store = Store(folder, 200)
    while True:
        terms = [generator.sample(range(200), generator.choice([0, 3, 8])) for _ in range(generator.randint(1, 300))]
        store.put(encoded(f"d{generator.randrange(6000)}", {term: generator.random() + 0.1 for term in some}) for some in terms)
        begun.set()
        store.delete([f"d{generator.randrange(6000)}" for _ in range(generator.randint(0, 150))])
        tidy = generator.random()
        if tidy < 0.1:
            store.optimize()
        elif tidy < 0.2:
            store.rebuild()


@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.slow)])  # a minute and a half
def test_killed_while_documents_change(kills, tmp_path):
    """At random moments; each time the engine has what the truth has, no more and no less."""
    context = preloaded_context()
    Store.create(tmp_path / "store")
    for _ in range(kills):
        begun = context.Event()
        process = context.Process(target=_change, args=(tmp_path / "store", random.random(), begun))
        process.start()
        assert begun.wait(60)  # however long it takes to start on a busy machine
        process.join(random.uniform(0, 1.2))
        assert process.exitcode is None
        process.kill()
        process.join()
        store = Store(tmp_path / "store", 200)
        every = np.arange(200), np.ones(200, np.float32), 10_000
        found, exact = (dict(store.search(*every, exact=exact)) for exact in (False, True))
        assert found == pytest.approx(exact, rel=1e-5)
        assert len(exact) == sum(len(document.terms) > 0 for document in store)
        store.close()
    assert len(exact) > 100


def test_a_damaged_engine_is_made_again(store, caplog):
    store.put([encoded("a", {3: 2.0})])
    store.close()
    for path in (store.folder / "engine").rglob("*"):
        if path.is_file():
            path.write_bytes(b"torn")
    again = Store(store.folder, VOCABULARY)
    assert again.search(np.array([3]), np.array([1.0], np.float32), 5) == [(1, 2.0)]
    assert "the engine is damaged" in caplog.text
    again.close()


def test_a_damaged_truth_is_said(store):
    store.close()
    for path in store.folder.glob("documents.sqlite*"):
        path.write_bytes(b"torn" * 1000)
    with pytest.raises(DataError, match="the index is damaged"):
        Store(store.folder, VOCABULARY)
    (store.folder / "documents.sqlite").unlink()
    with pytest.raises(DataError, match=r"the index is damaged \(documents.sqlite is missing\)"):
        Store(store.folder, VOCABULARY)


def test_a_full_folder_is_no_place_for_a_snapshot(store, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        store.snapshot(tmp_path / "full")


ODD = {
    "large": 10**30,
    "negative": -(2**63),
    "none": None,
    "nested": {"a": {"b": [1, True, "\ud800"]}},
    "half \ud800": "\udfff",
    "yes": True,
    "one": 1,
    "": "no name",
    "a.b": 'quoted "text"',
}


def test_any_metadata_goes_in_and_is_matched_alike(store):
    """What the engine cannot hold must not stand in the truth alone: no opening could bring the engine up to date."""
    store.put([encoded("odd", {1: 1.0}, metadata=ODD), encoded("other", {1: 1.0}, metadata={"one": 2})])
    (position,) = [position for position in store.positions().tolist() if store.ids([position]) == ["odd"]]
    for name, value in ODD.items():
        if name and isinstance(value, str | int | float):
            for exact in (False, True):
                assert store.search(np.array([1]), np.array([1.0]), 5, {name: value}, exact) == [(position, 1.0)], name
                assert store.search(np.array([1]), np.array([1.0]), 5, {name: f"{value}!"}, exact) == [], name
    assert store.documents([position])[0].content.metadata == ODD


def test_a_pass_over_all_documents_sees_one_state(store):
    store.put([encoded("a", {1: 1.0}), encoded("b", {1: 1.0})])
    documents = iter(store)
    seen = [next(documents).id]
    store.put([encoded("b", {2: 2.0}), encoded("c", {1: 1.0})])
    store.delete(["a"])
    rest = list(documents)
    assert [*seen, *(document.id for document in rest)] == ["a", "b"]
    assert rest[0].terms.tolist() == [1]
    assert [document.id for document in store] == ["b", "c"]


def test_a_store_closed_by_another_thread_can_be_opened_again(tmp_path):
    Store.create(tmp_path / "store")
    first = Store(tmp_path / "store", 10)
    closing = threading.Thread(target=first.close)
    closing.start()
    closing.join()
    second = Store(tmp_path / "store", 10)
    second.put([EncodedDocument("a", Document("", "text"), np.array([1]), np.array([1.0], np.float32))])  # refused while it is held
    second.close()
