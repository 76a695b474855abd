"""Own words kept: by hand, in parts, and for the pieces that do not count."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from anysplade import load_encoder
from anysplade.model.encoding import encode, encode_counted
from anysplade.model.own_words import PieceCounts, counts_as_own, document_frequency, lucene_idf, own_words
from tiny import SPECIAL, WORDS, make_lexical


def test_own_words_by_hand():
    vectors = sparse.csr_matrix(np.array([[0.0, 1.0, 0.0, 2.0], [0.5, 0.0, 0.0, 0.0]]))
    idf = np.array([1.0, 2.0, 4.0, 8.0])
    assert own_words(vectors, [[1, 1, 2], [0]], idf) == (2 + 1) / (2 + 4 + 1)  # piece 1 is twice in a text and counts once
    assert own_words(vectors, [[], []], idf) is None
    assert own_words(vectors, [[9], [0]], idf) == 1  # a token without a row in the head


def test_the_idf_is_lucenes():
    frequency = document_frequency(np.array([0, 0, 1, 1]), np.array([3, 1]), 3)
    assert frequency.tolist() == [1, 2, 0]
    expected = [math.log(1 + 1.5 / 1.5), math.log(1 + 0.5 / 2.5), math.log(1 + 2.5 / 0.5)]
    assert lucene_idf(frequency, 2).tolist() == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=6), st.sets(st.integers(0, 5))), min_size=1, max_size=6),
    cut=st.integers(0, 6),
)
def test_counts_of_parts_add_up_to_a_plain_loop(texts, cut):
    idf = np.array([0.0, 0.5, 1.0, 2.0, 3.0, 5.0])
    counts = PieceCounts(6)
    for part in (texts[:cut], texts[cut:]):
        vectors = np.zeros((len(part), 6), np.float32)
        for row, (_, active) in zip(vectors, part, strict=True):
            row[list(active)] = 1.5
        other = PieceCounts(6)
        ids = np.array([id_ for own, _ in part for id_ in own], np.int64)
        other.add(sparse.csr_matrix(vectors), ids, np.array([len(own) for own, _ in part], np.int64))
        counts.merge(other)
    kept = sum(idf[id_] for own, active in texts for id_ in set(own) & active)
    total = sum(idf[id_] for own, _ in texts for id_ in set(own))
    assert counts.texts == len(texts)
    assert counts.share(idf) == (pytest.approx(kept / total) if total else None)


@pytest.mark.parametrize("count", [1, 5])
def test_encoding_counts_as_a_tokenizer_does_also_from_the_cache(backbone, count, tmp_path):
    encoder = load_encoder(backbone, 1, 0)
    texts = [f"kabel {WORDS[i]} {WORDS[i + 1]} {'lobel ' * 100}" for i in range(count)]  # longer than the model reads
    ids = encoder.tokenizer(texts, truncation=True)["input_ids"]
    idf = np.linspace(1, 2, encoder.get_embedding_dimension())
    expected = own_words(encode(encoder, texts, "document"), ids, idf)
    cuts = []
    for _ in range(2):
        pieces = PieceCounts(len(idf))
        cuts.append(encode_counted(encoder, texts, "document", cache=tmp_path, pieces=pieces).cut)
        assert pieces.share(idf) == pytest.approx(expected)
    assert cuts[0] == cuts[1]


def test_special_tokens_and_prompts_do_not_count(tmp_path):
    encoder = load_encoder(make_lexical(tmp_path), 1, 0)
    encoder.prompts["query"] = "kabel "
    queries, documents = counts_as_own(encoder, "query"), counts_as_own(encoder, "document")
    assert not documents[: len(SPECIAL)].any()
    assert documents[len(SPECIAL) :].all()
    assert np.flatnonzero(queries != documents).tolist() == encoder.tokenizer.convert_tokens_to_ids(["kabel"])
