import pytest

from anysplade import Index, ModelError, OptionError
from anysplade.search.reranking import rerank


def test_a_cross_encoder_ranks_the_first_hits(static_index, teachers):
    with Index.load(static_index) as index:
        first = index.search("kabel lodan", k=20)
        hits = index.search("kabel lodan", k=5, rerank=teachers["cross-encoder"], rerank_depth=20, explain=True)
        again = index.search("kabel lodan", k=5, rerank=teachers["cross-encoder"], rerank_depth=20)
        assert index.search("nothing", rerank=teachers["cross-encoder"]) == []
    expected = rerank(teachers["cross-encoder"], "kabel lodan", [(hit.id, hit.text) for hit in first])
    assert [(hit.id, hit.score) for hit in again] == [(hit.id, hit.score) for hit in hits]
    assert [hit.id for hit in hits] == [id_ for id_, _ in expected[:5]]
    assert [hit.score for hit in hits] == pytest.approx([score for _, score in expected[:5]], abs=1e-5)
    for hit in hits:
        part = hit.parts["search"]
        assert first[part.rank - 1].id == hit.id
        assert part.score == pytest.approx(first[part.rank - 1].score)
        assert part.score == pytest.approx(sum(match.product for match in hit.terms))


def test_mistakes(static_index, teachers):
    with Index.load(static_index) as index:
        with pytest.raises(OptionError, match="`rerank_depth` is 5: it is at least `k`, 10"):
            index.search("kabel", rerank=teachers["cross-encoder"], rerank_depth=5)
        with pytest.raises(OptionError, match="give it as `text`"):
            index.search_vector(index.queries.encode(["kabel"]), rerank=teachers["cross-encoder"])
        with pytest.raises(ModelError):
            index.search("kabel", rerank=teachers["dense"])
