import os

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder

import anysplade.model.encoding as encoding
from anysplade import ModelError, load_encoder
from anysplade._common.cache import cache_entries, release
from anysplade.model.encoder import build_encoder
from anysplade.model.encoding import count_truncated, encode
from anysplade.model.modules import masked_lm
from anysplade.model.queries import Cut, log_cut
from anysplade.model.runtimes import for_inference, resolve_precision
from tiny import WORDS, counted_copy


@pytest.fixture(scope="module")
def encoder(backbone):
    # Not calibrated: 0.3 % of so small a vocabulary is less than one term, and the k for that blows rounding up.
    return load_encoder(backbone, k=1, shift=0)


TEXTS = [" ".join(WORDS[: n % 60]) for n in (3, 50, 0, 7, 119, 1, 30, 2, 58)]


@pytest.mark.parametrize("role", ["query", "document"])
@pytest.mark.parametrize("tokens, chunk", [(4096, 4096), (64, 4), (1, 2)])
def test_rows_are_those_of_sentence_transformers_in_order(encoder, role, tokens, chunk, monkeypatch):
    monkeypatch.setattr("anysplade.model.batches._TOKENS", tokens)
    monkeypatch.setattr(encoding, "_CHUNK", chunk)
    method = encoder.encode_query if role == "query" else encoder.encode_document
    rows = encode(encoder, TEXTS, role)
    assert rows.dtype == np.float32
    assert rows.has_sorted_indices
    assert (rows.data > 0).all()
    expected = method(TEXTS, convert_to_sparse_tensor=False).numpy()
    np.testing.assert_allclose(rows.toarray(), expected, rtol=1e-4, atol=1e-5)


def test_vectors_in_a_cache_are_in_use(encoder, tmp_path):
    """New ones and those of an earlier call, so that they are not removed meanwhile, and later not first."""
    folder = tmp_path / "vectors" / ("a" * 32)
    for _ in range(2):
        encode(encoder, TEXTS, "query", cache=folder)
        (entry,) = cache_entries(tmp_path)
        assert entry.in_use
        assert entry.last_use > 10_000
        release()
        for path in (*folder.iterdir(), folder):
            os.utime(path, (10_000, 10_000))


def test_no_texts(encoder):
    assert encode(encoder, [], "query").shape == (0, encoder.get_embedding_dimension())


def test_bfloat16_is_near_and_said(encoder):
    half, exact = (encode(for_inference(encoder, "torch", p), TEXTS, "document").toarray() for p in ("bfloat16", "float32"))
    assert not np.array_equal(half, exact)
    lengths = np.linalg.norm(half, axis=1) * np.linalg.norm(exact, axis=1)
    assert ((half * exact).sum(axis=1) >= 0.9 * lengths).all()
    assert resolve_precision("auto", torch.device("cpu")) in ("float32", "bfloat16")


def test_one_copy_in_bfloat16(backbone, monkeypatch):
    """However often one encodes: a copy takes as long as many texts."""
    copies = []
    monkeypatch.setattr(SparseEncoder, "__deepcopy__", counted_copy(copies), raising=False)
    encoder = load_encoder(backbone, k=1, shift=0)
    half = for_inference(encoder, "torch", "bfloat16")
    rows = [encode(half, [text], role) for text in TEXTS for role in ("query", "document")]
    assert copies == [encoder]
    assert rows[0].nnz
    assert for_inference(encoder, "torch", "float32") is encoder
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_a_lone_surrogate_is_encoded(encoder):
    """JSON can hold one; no tokenizer takes it."""
    pair = encode(encoder, [f"{WORDS[0]} \ud800", f"{WORDS[0]} \ufffd"], "document").toarray()
    np.testing.assert_allclose(pair[0], pair[1], rtol=1e-5)


def test_a_diverged_model_is_refused(backbone):
    encoder = load_encoder(backbone)
    with torch.no_grad():
        masked_lm(encoder).get_input_embeddings().weight[5 + 50] = torch.nan
    with pytest.raises(ModelError, match="document text 3; its training diverged"):
        encode(encoder, [WORDS[0], WORDS[1], f"{WORDS[2]} {WORDS[50]}"], "document")
    with pytest.raises(ModelError, match="document 'c'; its training diverged"):
        encode(encoder, [WORDS[0], WORDS[1], f"{WORDS[2]} {WORDS[50]}"], "document", ids=["a", "b", "c"])


@pytest.mark.parametrize("query_encoder", ["mlm", "static"])
def test_texts_that_are_cut_are_counted(query_encoder, backbone):
    encoder, _ = build_encoder(backbone, query_encoder=query_encoder, idf_texts=["kabel lodan"], max_length=6)
    encoder.prompts["document"] = "kabel "
    texts = ["kabel", "kabel lodan mifil", "kabel lodan mifil nugor", "kabel lodan mifil nugor pehan", "\ud800 " * 100]
    assert count_truncated(encoder, texts, "document") == Cut(3, 6, 64)  # six tokens: the prompt, two special ones and three words
    assert count_truncated(encoder, texts, "query") == (Cut(2, 6, 64) if query_encoder == "mlm" else Cut(1, 6, 6))
    assert count_truncated(encoder, [], "document") == Cut(0, 6, 64)


@pytest.mark.parametrize("max_length, advice", [(6, "`max_length` raises the limit, up to 64"), (64, "the model reads no more")])
def test_the_models_own_limit_is_told_apart_from_one_that_can_be_raised(max_length, advice, backbone, caplog):
    caplog.set_level("INFO", "anysplade")
    encoder = load_encoder(backbone, max_length=max_length)
    log_cut(count_truncated(encoder, ["kabel " * 100], "document"), 1, "documents")
    assert f"cut at {max_length} tokens, and what follows cannot be found; {advice}" in caplog.text
