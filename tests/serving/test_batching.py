import asyncio
import json
import logging
import shutil
import threading

import pytest

from anysplade import Document, Index
from anysplade.errors import AnyspladeError, DataError, ExtraError, ModelError
from anysplade.model.encoding import ModelQueries
from anysplade.search.store import Store
from anysplade.serving import batching
from anysplade.serving.batching import OverloadedError, Searcher, StoppedError
from tiny import WORDS, make_backbone, make_collection


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searcher")
    make_backbone("bert", folder / "model")
    make_collection(folder / "collection")
    Index.build(folder / "model", folder / "collection", folder / "index").close()
    return folder


async def use(folder, work, beside=None):
    searcher = Searcher(folder, beside)
    searcher.start()
    try:
        return await work(searcher)
    finally:
        await searcher.stop()


def test_the_same_hits_as_the_index(place):
    queries = [" ".join(WORDS[i : i + 3]) for i in range(0, 60, 3)]

    async def all_at_once(searcher):
        sizes = []
        searcher.on_batch = sizes.append
        return await asyncio.gather(*(searcher.search(query, 5, True) for query in queries)), sizes

    results, sizes = asyncio.run(use(place / "index", all_at_once))
    assert max(sizes) > 1
    assert sum(sizes) == len(queries)
    with Index.load(place / "index") as index:
        for query, hits in zip(queries, results, strict=True):
            expected = index.search(query, 5, explain=True)
            assert [hit.id for hit in hits] == [hit.id for hit in expected]
            assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], rel=1e-5)


def test_requests_of_both_roles_in_one_batch(place):
    async def mixed(searcher):
        return await asyncio.gather(
            searcher.encode(["kabel", "locor", "midan"], "document"),
            searcher.encode(["kabel"], "query"),
            searcher.explain("kabel", "nothing"),
        )

    documents, query, nothing = asyncio.run(use(place / "index", mixed))
    assert documents.shape[0] == 3
    assert query.shape[0] == 1
    assert nothing is None


def test_beside_bm25_and_another_index(place):
    async def beside(searcher):
        return await searcher.search_beside("kabel locor", 3)

    by_bm25 = asyncio.run(use(place / "index", beside, "bm25"))
    assert all(hit.score > 0 for hit in by_bm25)
    shutil.copytree(place / "index", place / "second")
    by_index = asyncio.run(use(place / "index", beside, str(place / "second")))
    with Index.load(place / "index") as index:
        assert [hit.id for hit in by_index] == [hit.id for hit in index.search("kabel locor", 3)]
    with pytest.raises(DataError, match="no index there"):
        Searcher(place / "index", str(place / "nowhere"))


def test_requests_are_refused_when_too_many_wait(place, monkeypatch):
    monkeypatch.setattr(batching, "MAX_WAITING", 4)
    monkeypatch.setattr(batching, "MAX_BATCH", 1)

    async def flood(searcher):
        pending = [asyncio.create_task(searcher.search("kabel", 3, False)) for _ in range(40)]
        results = await asyncio.gather(*pending, return_exceptions=True)
        return results, await searcher.search("kabel", 3, False)

    results, after = asyncio.run(use(place / "index", flood))
    refused = [result for result in results if isinstance(result, OverloadedError)]
    assert 0 < len(refused) < 40
    assert all(isinstance(result, list | OverloadedError) for result in results)
    assert after == next(result for result in results if isinstance(result, list))


def test_a_failure_of_one_role_leaves_the_other_alone(place, monkeypatch):
    def fail(*_):
        raise ExtraError("torch is not installed")

    async def mixed(searcher):
        return await asyncio.gather(
            searcher.encode(["kabel"], "document"), searcher.search("kabel", 2, False), return_exceptions=True
        )

    monkeypatch.setattr(Searcher, "_encode_documents", fail)
    failed, fine = asyncio.run(use(place / "index", mixed))
    assert isinstance(failed, ExtraError)
    assert len(fine) == 2


def test_a_failure_affects_only_its_request(place):
    async def one_fails(searcher):
        return await asyncio.gather(searcher.search("kabel", 0, False), searcher.search("kabel", 2, False), return_exceptions=True)

    failed, fine = asyncio.run(use(place / "index", one_fails))
    assert "`k` is 0" in str(failed)
    assert len(fine) == 2


def test_a_cancelled_request_is_skipped(place):
    async def gone(searcher):
        task = asyncio.create_task(searcher.search("kabel", 2, False))
        await asyncio.sleep(0)
        task.cancel()
        return await searcher.search("kabel", 2, False)

    assert len(asyncio.run(use(place / "index", gone))) == 2


def test_a_rebuilt_index_is_opened_without_a_lost_request(place, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    shutil.copytree(place / "index", tmp_path / "index")
    only = {"new": Document("", "kabel")}
    Index.build(place / "model", only, tmp_path / "next").close()

    async def swap(searcher):
        before = await searcher.search("kabel", 50, False)
        (tmp_path / "index").rename(tmp_path / "old")
        without = await searcher.search("kabel", 50, False)
        shutil.copytree(tmp_path / "next", tmp_path / "index")
        about = json.loads((tmp_path / "index" / "index.json").read_text())
        (tmp_path / "index" / "index.json").write_text(json.dumps(about | {"complete": False}))
        unfinished = await searcher.search("kabel", 50, False)
        (tmp_path / "index" / "index.json").write_text(json.dumps(about))
        after = await asyncio.gather(*(searcher.search("kabel", 50, False) for _ in range(8)))
        return before, without, unfinished, after

    before, without, unfinished, after = asyncio.run(use(tmp_path / "index", swap))
    assert len(before) > 1
    assert before == without == unfinished
    assert [[hit.id for hit in hits] for hits in after] == [["new"]] * 8
    assert "cannot be opened yet" in caplog.text
    assert "opened the rebuilt index, 1 documents" in caplog.text


SECONDS = 30  # longer than anything here takes, unless it hangs


def within(coroutine):
    async def run():
        async with asyncio.timeout(SECONDS):
            return await coroutine

    return asyncio.run(run())


class Gate:
    """Blocks until it is opened."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def wait(self):
        self.reached.set()
        assert self.open.wait(SECONDS)


def test_stop_finishes_running_and_waiting_requests_and_refuses_later_ones(place, monkeypatch):
    monkeypatch.setattr(batching, "MAX_BATCH", 1)
    gate, work = Gate(), Searcher._run_batch
    monkeypatch.setattr(Searcher, "_run_batch", lambda self, jobs: (gate.wait(), work(self, jobs))[1])

    async def stopped_meanwhile():
        searcher = Searcher(place / "index")
        with pytest.raises(StoppedError):  # not started
            await searcher.search("kabel", 2, False)
        searcher.start()
        pending = [asyncio.create_task(searcher.search("kabel", 2, False)) for _ in range(3)]
        await asyncio.to_thread(gate.reached.wait, SECONDS)
        stopping = asyncio.create_task(searcher.stop())
        await asyncio.sleep(0)
        with pytest.raises(StoppedError, match="start the server again"):
            await searcher.search("kabel", 2, False)
        assert not any(task.done() for task in pending)
        gate.open.set()
        results = await asyncio.gather(*pending)
        await stopping
        with pytest.raises(StoppedError):
            await searcher.cached("bm25", searcher._build_bm25)
        await searcher.stop()  # a second time changes nothing
        return results

    assert [len(hits) for hits in within(stopped_meanwhile())] == [2, 2, 2]


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_requests_fail_when_the_loop_ended(how, place, monkeypatch, caplog):
    gate, work = Gate(), Searcher._run_batch
    monkeypatch.setattr(Searcher, "_run_batch", lambda self, jobs: (gate.wait(), work(self, jobs))[1])

    async def ended():
        searcher = Searcher(place / "index")
        if how == "failed":
            monkeypatch.setattr(searcher, "_jobs", Broken())
        searcher.start()
        pending = [asyncio.create_task(searcher.search("kabel", 2, False)) for _ in range(3)]
        if how == "cancelled":
            await asyncio.to_thread(gate.reached.wait, SECONDS)
            searcher._loop.cancel()
        results = await asyncio.gather(*pending, return_exceptions=True)
        with pytest.raises(StoppedError):
            await searcher.search("kabel", 2, False)
        gate.open.set()
        await searcher.stop()
        return results, searcher.running

    class Broken(asyncio.Queue):
        async def get(self):
            await super().get()
            raise OSError("broken")

    results, running = within(ended())
    assert [type(result) for result in results] == [StoppedError] * 3
    assert not running
    assert ("OSError('broken')" in caplog.text) == (how == "failed")


class PanicException(BaseException):
    """Like that of the engine, which is no Exception."""


@pytest.mark.parametrize(
    "failure, seen", [(PanicException("panic"), AnyspladeError), (StopIteration(), AnyspladeError), (OSError(), OSError)]
)
@pytest.mark.parametrize("where", ["a search", "encoding", "the thread", "on_batch"])
def test_no_failure_ends_the_loop(where, failure, seen, place, monkeypatch):
    async def fails_once(searcher):
        def fail(*_, **__):
            monkeypatch.undo()
            searcher.on_batch = lambda size: None
            raise failure

        if where == "a search":
            monkeypatch.setattr(Index, "search_vector", fail)
        elif where == "encoding":
            monkeypatch.setattr(ModelQueries, "encode", fail)
        elif where == "the thread":
            monkeypatch.setattr(Searcher, "_reload", fail)
        else:
            searcher.on_batch = fail
        with pytest.raises(seen):
            await searcher.search("kabel", 2, False)
        return await searcher.search("kabel", 2, False)

    assert len(within(use(place / "index", fails_once))) == 2


def test_searches_are_answered_while_the_whole_index_is_read(place, monkeypatch):
    gate, items, passes = Gate(), Store.__iter__, []

    def slow(self):
        passes.append(self)
        for item in items(self):
            gate.wait()
            yield item

    monkeypatch.setattr(Store, "__iter__", slow)

    async def both(searcher):
        pending = [asyncio.create_task(searcher.search_beside("kabel", 3)) for _ in range(4)]
        await asyncio.to_thread(gate.reached.wait, SECONDS)
        pending[0].cancel()  # a client that disconnects
        hits = [await searcher.search("kabel", 3, True) for _ in range(3)]
        assert not any(task.done() for task in pending[1:])
        gate.open.set()
        return hits, await asyncio.gather(*pending[1:]), await searcher.search_beside("kabel", 3)

    hits, beside, after = within(use(place / "index", both, "bm25"))
    assert [len(result) for result in hits] == [3, 3, 3]
    assert beside == [after] * 3
    assert len(passes) == 1


def test_a_failed_pass_is_repeated(place, monkeypatch):
    items = Store.__iter__

    def broken(self):
        monkeypatch.setattr(Store, "__iter__", items)
        raise OSError("broken")

    async def twice(searcher):
        monkeypatch.setattr(Store, "__iter__", broken)
        with pytest.raises(OSError, match="broken"):
            await searcher.search_beside("kabel", 3)
        return await searcher.search_beside("kabel", 3)

    assert within(use(place / "index", twice, "bm25"))


def test_a_pass_over_a_replaced_index_is_repeated_over_the_new_one(place, tmp_path, monkeypatch):
    shutil.copytree(place / "index", tmp_path / "index")
    Index.build(place / "model", {"new": Document("", "kabel")}, tmp_path / "next").close()
    gate, items = Gate(), Store.__iter__

    def slow(self):
        for item in items(self):
            gate.wait()
            yield item

    monkeypatch.setattr(Store, "__iter__", slow)

    async def swap(searcher):
        pending = asyncio.create_task(searcher.search_beside("kabel", 3))
        await asyncio.to_thread(gate.reached.wait, SECONDS)
        (tmp_path / "index").rename(tmp_path / "old")
        (tmp_path / "next").rename(tmp_path / "index")
        hits = await searcher.search("kabel", 3, False)
        gate.open.set()
        return hits, await pending

    hits, beside = within(use(tmp_path / "index", swap, "bm25"))
    assert [hit.id for hit in hits] == [hit.id for hit in beside] == ["new"]


def test_stop_abandons_a_pass_over_the_whole_index(place, monkeypatch):
    gate, items, read = Gate(), Store.__iter__, []

    def slow(self):
        for item in items(self):
            gate.wait()
            read.append(item)
            yield item

    monkeypatch.setattr(Store, "__iter__", slow)

    async def stopped_meanwhile():
        searcher = Searcher(place / "index", "bm25")
        searcher.start()
        pending = asyncio.create_task(searcher.search_beside("kabel", 3))
        await asyncio.to_thread(gate.reached.wait, SECONDS)
        stopping = asyncio.create_task(searcher.stop())
        await asyncio.sleep(0)
        gate.open.set()
        await stopping
        with pytest.raises(StoppedError):
            await pending

    within(stopped_meanwhile())
    assert len(read) < 3


def test_a_moved_model_is_given(place, tmp_path):
    shutil.copytree(place / "index", tmp_path / "index")
    shutil.copytree(place / "model", tmp_path / "elsewhere")
    shutil.move(place / "model", place / "away")
    try:
        with pytest.raises(ModelError, match="name it with `model`"):
            Searcher(tmp_path / "index")
        searcher = Searcher(tmp_path / "index", model=tmp_path / "elsewhere")
        assert searcher.documents == 40
        searcher.index.close()
    finally:
        shutil.move(place / "away", place / "model")
