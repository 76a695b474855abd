import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder

from anysplade.errors import ModelError, OptionError
from anysplade.search.reranking import open_reranker, rerank

HITS = [("a", "two cats"), ("b", "a dog runs"), ("c", "two cats"), ("d", "the moon")]


def test_the_order_of_the_raw_logits(teachers):
    model = CrossEncoder(teachers["cross-encoder"])
    logits = model.predict([("cats", text) for _, text in HITS[:3]], activation_fn=torch.nn.Identity())
    found = rerank(teachers["cross-encoder"], "cats", HITS, depth=3)
    assert [id_ for id_, _ in found] == ["abc"[i] for i in np.argsort(-logits, kind="stable")]
    assert [score for _, score in found] == pytest.approx(sorted(logits.tolist(), reverse=True), abs=1e-5)
    assert rerank(open_reranker(teachers["cross-encoder"]), "cats", HITS, 3) == found


def test_equal_scores_keep_their_order(teachers):
    opened = open_reranker(teachers["cross-encoder"])
    assert [id_ for id_, _ in rerank(opened, "cats", [HITS[2], HITS[0]])] == ["c", "a"]
    assert rerank(opened, "cats", []) == []


def test_faults(teachers):
    with pytest.raises(OptionError, match="`rerank_depth` is 0"):
        rerank(teachers["cross-encoder"], "cats", HITS, 0)
    with pytest.raises(ModelError, match="dense"):
        rerank(teachers["dense"], "cats", HITS)
