import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizer, DistilBertTokenizer, RobertaTokenizer

from anysplade import open_encoder
from anysplade.model.backbones import BUNDLED
from anysplade.model.encoder import build_encoder, term_names
from anysplade.model.encoding import ModelQueries, encode
from anysplade.model.queries import StaticQueries
from tiny import WORDS, make_backbone, make_tokenizer

SENTENCES = ["Where did the river flood in 1953?", "Étude: naïve CAFÉ, déjà vu", "日本 tokens, 😀 and e\u0301"]
TEXTS = [
    *SENTENCES,
    "",
    " ",
    "kabel",
    "kabel kabel lodan kabel",
    "[CLS] [PAD] kabel[SEP] [MASK]",
    "\ud800 kabel \udfff",
    "😀 kabel",
    "kabel\x00lodan\nmifil\u00a0nugor",
    "a" * 300,
    " ".join(WORDS) + " river",
    "kabel lodan " * 100,
]


def wordpiece(kind, **options):
    vocabulary = AutoTokenizer.from_pretrained(BUNDLED["bert-tiny"]).get_vocab()
    return kind(vocab=vocabulary, model_max_length=64, **options)


def byte_pairs():
    letters = ["Ġ", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "Ġk", "Ġka"])}
    return RobertaTokenizer(vocab=vocabulary, merges=[("Ġ", "k"), ("Ġk", "a")], model_max_length=32)


# The tokenizer, and whether transformers is needed to read it.
TOKENIZERS = {
    "words": (make_tokenizer, False),
    "bundled": (lambda: AutoTokenizer.from_pretrained(BUNDLED["bert-tiny"]), False),
    "BERT": (lambda: wordpiece(BertTokenizer), False),
    "BERT, cased": (lambda: wordpiece(BertTokenizer, do_lower_case=False, strip_accents=True), False),
    "DistilBERT": (lambda: wordpiece(DistilBertTokenizer, tokenize_chinese_chars=False), False),
    "RoBERTa": (byte_pairs, True),
}


def save_static(tokenizer, folder, query_encoder="idf", prompt="", **options):
    """Save a model whose queries have a weight a token, and return its folder."""
    backbone = make_backbone("bert", folder / "backbone", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(backbone)
    texts = ["kabel lodan", *SENTENCES]
    encoder, _ = build_encoder(backbone, 1, 0, query_encoder=query_encoder, idf_texts=texts, **options)
    encoder.prompts["query"] = prompt
    encoder.save_pretrained(str(folder / "model"))
    return str(folder / "model")


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    return save_static(make_tokenizer(), tmp_path_factory.mktemp("static"))


def open_both(model):
    queries = StaticQueries.open(model)
    assert queries is not None
    return queries, open_encoder(model)


def assert_same(ours, theirs):
    """To the bit, in the same layout."""
    assert ours.shape == theirs.shape
    assert ours.has_canonical_format
    for name in ("data", "indices", "indptr"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("query_encoder, prompt", [("idf", ""), ("static", "Kabel river: ")])
def test_vectors_are_those_of_the_model_to_the_bit(name, query_encoder, prompt, tmp_path):
    queries, encoder = open_both(save_static(TOKENIZERS[name][0](), tmp_path, query_encoder, prompt))
    if query_encoder == "static":  # trained weights: negative ones, zeros, and special tokens that count
        weights = encoder[0].sub_modules["query"][0].weight
        with torch.no_grad():
            weights.copy_(torch.randn(len(weights), generator=torch.Generator().manual_seed(0)))
            weights[::3] = 0
        encoder.save_pretrained(str(tmp_path / "model"))
        queries, encoder = open_both(str(tmp_path / "model"))
    for text in TEXTS:
        assert_same(queries.encode([text]), encode(encoder, [text], "query"))
    without_padding = [text for text in TEXTS if "[PAD]" not in text]
    assert_same(queries.encode(without_padding), encode(encoder, without_padding, "query"))
    assert_same(queries.encode([]), encode(encoder, [], "query"))
    assert queries.encode(TEXTS).nnz > 10
    assert queries.term_names == term_names(encoder)
    reference = ModelQueries(encoder)
    assert queries.count_cut(TEXTS) == reference.count_cut(TEXTS)
    for text in TEXTS:
        for special in (True, False):
            assert queries.tokens(text, special) == reference.tokens(text, special)


def test_a_query_of_any_length(bert_both):
    queries, encoder = bert_both
    text = "river flood " * 50_000
    assert_same(queries.encode([text]), encode(encoder, [text], "query"))


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec=None), max_size=40))
def test_any_text_has_the_vector_of_the_model(text, bert_both):
    queries, encoder = bert_both
    assert_same(queries.encode([text]), encode(encoder, [text], "query"))


@pytest.fixture(scope="module")
def bert_both(tmp_path_factory):
    return open_both(save_static(wordpiece(BertTokenizer), tmp_path_factory.mktemp("bert"), "static"))
