from types import SimpleNamespace

import numpy as np
import pytest

from anysplade import ModelError
from anysplade.model.dense import encode_dense, is_dense, open_dense
from tiny import WORDS

TEXTS = [" ".join(WORDS[: n % 60]) for n in (3, 50, 0, 7, 119, 1)] + ["\ud800 kabel"]


def test_a_dense_model_is_known_by_what_it_was_saved_as(teachers):
    assert is_dense(teachers["dense"])
    assert not any(is_dense(teachers[kind]) for kind in ("sparse", "cross-encoder", "body", "lexical"))


def test_vectors_are_those_of_sentence_transformers_and_kept(teachers, tmp_path):
    model = open_dense(teachers["dense"])
    vectors = encode_dense(model, TEXTS, "query", batch_size=2, cache=tmp_path)
    expected = model.encode_query([text.replace("\ud800", "\ufffd") for text in TEXTS], normalize_embeddings=True)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert vectors.dtype == np.float32
    model.encode_query = None  # nothing is encoded again
    np.testing.assert_array_equal(encode_dense(model, TEXTS, "query", cache=tmp_path), vectors)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TypeError):
        encode_dense(model, TEXTS, "query", cache=tmp_path)
    assert encode_dense(model, [], "document").shape == (0, 32)


def test_texts_are_cut(teachers):
    short, long = (encode_dense(open_dense(teachers["dense"], n), ["kabel " + "lodan " * 40], "document") for n in (4, 40))
    assert not np.allclose(short, long)


def test_a_folder_that_holds_no_dense_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded as a dense model"):
        open_dense(str(tmp_path))


def test_progress_is_shown_batch_by_batch(teachers):
    seen = []
    encode_dense(open_dense(teachers["dense"]), TEXTS, "query", batch_size=2, shown=SimpleNamespace(update=seen.append))
    assert seen == [2, 2, 2, 1]
