import numpy as np
import pytest
import torch

from anysplade import Document, Index, ModelError, OptionError, encode, inspect_head, load_encoder, open_encoder, terms
from anysplade.model.vocabulary import split_words

# characters:  0123456789012345678901234567890123456
TEXT = "The laminar anti-flow of 2020s (spin)"
NAMES = ["the", "lam", "##ina", "##r", "anti", "-", "flow", "of", "20", "##20", "##s", "(", "##spin", ")"]
SPANS = [
    (0, 3),
    (4, 7),
    (7, 10),
    (10, 11),
    (12, 16),
    (16, 17),
    (17, 21),
    (22, 24),
    (25, 27),
    (27, 29),
    (29, 30),
    (31, 32),
    (32, 36),
]


def test_pieces_belong_to_the_word_that_the_tokenizer_split():
    tokens = [(term, *span) for term, span in enumerate(SPANS)]
    # After a parenthesis a byte-level tokenizer writes a whole word like a piece: no letter precedes it, so it is one by itself.
    assert split_words(TEXT, tokens, NAMES) == dict.fromkeys((1, 2, 3), "laminar") | dict.fromkeys((8, 9, 10), "2020s")


def test_scripts_without_spaces_stay_apart():
    names = ["▁", "##東", "##京"]
    assert split_words("東京", [(1, 0, 1), (2, 1, 2)], names) == {}


def test_a_piece_in_two_words_counts_for_the_first():
    names = ["ab", "##c", "de"]
    assert split_words("abc dec", [(0, 0, 2), (1, 2, 3), (2, 4, 6), (1, 6, 7)], names) == {0: "abc", 1: "abc", 2: "dec"}


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("bert-tiny")


def test_terms_are_the_vector_in_words(encoder):
    text = "Compute the laminarization of numpy arrays"
    vectors = encode(encoder, [text, "x"], "document")
    every = terms(vectors[0], encoder)
    assert len(every) == vectors[0].nnz
    assert [term.weight for term in every] == sorted((term.weight for term in every), reverse=True)
    assert {term.ids[0]: term.weight for term in every} == dict(zip(vectors[0].indices, vectors[0].data.tolist(), strict=True))
    words = terms(vectors[0], encoder, text)
    assert "laminarization" in {term.term for term in words}
    assert sum(term.weight for term in words) == pytest.approx(vectors[0].sum())
    assert sorted(i for term in words for i in term.ids) == sorted(vectors[0].indices)
    assert len(terms(vectors[0], encoder, k=3)) == 3
    stock = encoder.encode_document([text])
    for vector in (vectors[0].toarray(), vectors[0].toarray()[0], stock, stock[0], torch.tensor(vectors[0].toarray())):
        assert [term.term for term in terms(vector, encoder)][:5] == [term.term for term in every][:5]
    assert repr(every).count("\n") < 50


def test_what_is_no_vector_of_the_encoder_is_refused(encoder):
    vectors = encode(encoder, ["a", "b"], "document")
    with pytest.raises(OptionError, match=r"`vector` has 2 rows; give one of them, such as vectors\[0\]"):
        terms(vectors, encoder)
    with pytest.raises(OptionError, match="`vector` has 5 terms and the encoder 8,192"):
        terms(np.ones(5), encoder)
    with pytest.raises(OptionError, match="`encoder` is a str; give a SparseEncoder"):
        terms(vectors[0], "bert-tiny")


@pytest.mark.parametrize(
    "texts, role, message",
    [
        ("a string", "query", r"`texts` is one str, .* give a list: \[text\]"),
        (b"bytes", "query", "`texts` is one bytes"),
        (["a", None], "query", "`texts`: item 2 is a NoneType"),
        ([["a"]], "query", "`texts`: item 1 is a list"),
        (["a"], "doc", "`role` is 'doc'; give 'query' or 'document'"),
        (["a"], None, "`role` is None"),
    ],
)
def test_what_is_nearly_right_is_refused_with_the_fix(texts, role, message, encoder):
    with pytest.raises(OptionError, match=message):
        encode(encoder, texts, role)


def test_texts_may_be_any_iterable(encoder):
    rows = encode(encoder, ["a", "b"], "query")
    assert (encode(encoder, (text for text in "ab"), "query") != rows).nnz == 0
    assert (encode(encoder, np.array(["a", "b"]), "query") != rows).nnz == 0


def test_a_model_is_named_not_given(encoder, tmp_path):
    for take in (open_encoder, inspect_head, lambda model: Index.build(model, {"1": Document("", "a")}, tmp_path / "index")):
        with pytest.raises((ModelError, OptionError), match="save"):
            take(object())
    with pytest.raises(ModelError, match="a SparseEncoder, not a model's folder or hub id; save the model with save_pretrained"):
        Index.build(encoder, {"1": Document("", "a")}, tmp_path / "index")
    for corpus, message in (
        (["a", "b"], "documents are a list; give {"),
        ({"1": "a"}, "document '1': maps a str to a str; give {"),
        ({1: Document("", "a")}, "document '1': maps a int to a Document"),
    ):
        with pytest.raises(OptionError, match=message):
            Index.build("bert-tiny", corpus, tmp_path / "index")
    assert not (tmp_path / "index").exists()
