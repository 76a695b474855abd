import pytest

from anysplade import Index, ModelError, OptionError
from anysplade.model.cross_encoder import open_cross_encoder, rate_pairs


def test_a_cross_encoder_ranks_the_first_hits(static_index, teachers):
    with Index.load(static_index) as index:
        first = index.search("kabel lodan", k=20)
        hits = index.search("kabel lodan", k=5, rerank=teachers["cross-encoder"], rerank_depth=20, explain=True)
        again = index.search("kabel lodan", k=5, rerank=teachers["cross-encoder"], rerank_depth=20)
        assert index.search("nothing", rerank=teachers["cross-encoder"]) == []
    encoder = open_cross_encoder(teachers["cross-encoder"])
    pairs = [("kabel lodan", f"{hit.title} {hit.text}".strip()) for hit in first]
    scores = dict(zip([hit.id for hit in first], rate_pairs(encoder, "", pairs).tolist(), strict=True))
    expected = sorted(scores, key=lambda id_: -scores[id_])[:5]
    assert [hit.id for hit in hits] == [hit.id for hit in again] == expected
    for hit in hits:
        assert hit.score == pytest.approx(scores[hit.id], abs=1e-5)
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
            index.search("kabel", rerank=teachers["body"])
