import asyncio
import json
import logging
import shutil

import pytest

from anysplade import Document, Index, searcher
from anysplade.errors import DataError
from anysplade.searcher import OverloadedError, Searcher
from tiny import WORDS, make_backbone, make_collection


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searcher")
    make_backbone("bert", folder / "model")
    make_collection(folder / "collection")
    Index.build(folder / "model", folder / "collection", folder / "index").close()
    return folder


async def use(folder, ask, beside=None):
    served = Searcher(folder, beside)
    served.start()
    try:
        return await ask(served)
    finally:
        await served.stop()


def test_the_same_hits_as_the_index(place):
    queries = [" ".join(WORDS[i : i + 3]) for i in range(0, 60, 3)]

    async def all_at_once(served):
        sizes = []
        served.on_batch = sizes.append
        return await asyncio.gather(*(served.search(query, 5, True) for query in queries)), sizes

    found, sizes = asyncio.run(use(place / "index", all_at_once))
    assert max(sizes) > 1
    assert sum(sizes) == len(queries)
    with Index.load(place / "index") as index:
        for query, hits in zip(queries, found, strict=True):
            expected = index.search(query, 5, explain=True)
            assert [hit.id for hit in hits] == [hit.id for hit in expected]
            assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], rel=1e-5)


def test_roles_go_together_and_come_apart(place):
    async def mixed(served):
        return await asyncio.gather(
            served.encode(["kabel", "locor", "midan"], "document"),
            served.encode(["kabel"], "query"),
            served.explain("kabel", "nothing"),
        )

    documents, query, nothing = asyncio.run(use(place / "index", mixed))
    assert documents.shape[0] == 3
    assert query.shape[0] == 1
    assert nothing is None


def test_beside_bm25_and_another_index(place):
    async def beside(served):
        return await served.search_beside("kabel locor", 3)

    by_bm25 = asyncio.run(use(place / "index", beside, "bm25"))
    assert all(hit.score > 0 for hit in by_bm25)
    shutil.copytree(place / "index", place / "second")
    by_index = asyncio.run(use(place / "index", beside, str(place / "second")))
    with Index.load(place / "index") as index:
        assert [hit.id for hit in by_index] == [hit.id for hit in index.search("kabel locor", 3)]
    with pytest.raises(DataError, match="no index there"):
        Searcher(place / "index", str(place / "nowhere"))


def test_turned_away_when_too_many_wait_and_back_afterwards(place, monkeypatch):
    monkeypatch.setattr(searcher, "WAITING", 4)
    monkeypatch.setattr(searcher, "BATCH", 1)

    async def flood(served):
        asked = [asyncio.create_task(served.search("kabel", 3, False)) for _ in range(40)]
        results = await asyncio.gather(*asked, return_exceptions=True)
        return results, await served.search("kabel", 3, False)

    results, after = asyncio.run(use(place / "index", flood))
    refused = [result for result in results if isinstance(result, OverloadedError)]
    assert 0 < len(refused) < 40
    assert all(isinstance(result, list | OverloadedError) for result in results)
    assert after == next(result for result in results if isinstance(result, list))


def test_a_failure_is_that_requests_own(place):
    async def one_fails(served):
        return await asyncio.gather(served.search("kabel", 0, False), served.search("kabel", 2, False), return_exceptions=True)

    failed, fine = asyncio.run(use(place / "index", one_fails))
    assert "k is 0" in str(failed)
    assert len(fine) == 2


def test_a_client_that_went_away_is_passed_over(place):
    async def gone(served):
        task = asyncio.create_task(served.search("kabel", 2, False))
        await asyncio.sleep(0)
        task.cancel()
        return await served.search("kabel", 2, False)

    assert len(asyncio.run(use(place / "index", gone))) == 2


def test_a_rebuilt_index_is_taken_without_a_lost_request(place, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    shutil.copytree(place / "index", tmp_path / "index")
    only = {"new": Document("", "kabel")}
    Index.build(place / "model", only, tmp_path / "next").close()

    async def swap(served):
        before = await served.search("kabel", 50, False)
        (tmp_path / "index").rename(tmp_path / "old")
        without = await served.search("kabel", 50, False)
        shutil.copytree(tmp_path / "next", tmp_path / "index")
        about = json.loads((tmp_path / "index" / "index.json").read_text())
        (tmp_path / "index" / "index.json").write_text(json.dumps(about | {"complete": False}))
        unfinished = await served.search("kabel", 50, False)
        (tmp_path / "index" / "index.json").write_text(json.dumps(about))
        after = await asyncio.gather(*(served.search("kabel", 50, False) for _ in range(8)))
        return before, without, unfinished, after

    before, without, unfinished, after = asyncio.run(use(tmp_path / "index", swap))
    assert len(before) > 1
    assert before == without == unfinished
    assert [[hit.id for hit in hits] for hits in after] == [["new"]] * 8
    assert "cannot be opened yet" in caplog.text
    assert "opened anew, 1 documents" in caplog.text
