import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertTokenizer, DistilBertTokenizer, RobertaTokenizer

from anysplade import ModelError, load_encoder, open_encoder
from anysplade.model.backbones import BUNDLED
from anysplade.model.encoding import ModelQueries, encode
from anysplade.model.modules import term_names
from anysplade.model.queries import StaticQueries
from processes import run_python
from tiny import WORDS, make_static, make_tokenizer

TEXTS = [
    "Where did the river flood in 1953?",
    "Étude: naïve CAFÉ, déjà vu",
    "日本 tokens, 😀 and e\u0301",
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
    return kind(vocab=vocabulary, **{"model_max_length": 64} | options)


def byte_pairs():
    letters = ["Ġ", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "Ġk", "Ġka"])}
    return RobertaTokenizer(vocab=vocabulary, merges=[("Ġ", "k"), ("Ġk", "a")], model_max_length=32)


TOKENIZERS = {
    "words": make_tokenizer,
    "bundled": lambda: AutoTokenizer.from_pretrained(BUNDLED["bert-tiny"]),
    "BERT": lambda: wordpiece(BertTokenizer),
    "BERT, cased": lambda: wordpiece(BertTokenizer, do_lower_case=False, strip_accents=True),
    "DistilBERT": lambda: wordpiece(DistilBertTokenizer, tokenize_chinese_chars=False),
    "cut on the left": lambda: wordpiece(BertTokenizer, truncation_side="left"),
    "no limit": lambda: wordpiece(BertTokenizer, model_max_length=None),
    "RoBERTa": byte_pairs,
}


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
    queries, encoder = open_both(make_static(tmp_path, TOKENIZERS[name](), query_encoder, prompt))
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
    assert queries.count_truncated(TEXTS) == reference.count_truncated(TEXTS)
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
    return open_both(make_static(tmp_path_factory.mktemp("bert"), wordpiece(BertTokenizer), "static"))


READ_DIRECTLY = {name for name in TOKENIZERS if name != "RoBERTa"}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_transformers_is_imported_for_few_tokenizers_only(name, tmp_path):
    model = make_static(tmp_path, TOKENIZERS[name]())
    code = f"""
import sys
from anysplade.model.queries import StaticQueries
assert StaticQueries.open({model!r}).encode(["kabel"]).nnz
print({{"torch", "transformers", "sentence_transformers"}} & set(sys.modules))
"""
    assert (run_python("-c", code).stdout.strip() == "set()") == (name in READ_DIRECTLY)


def rewrite_json(path, changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"split_special_tokens": True},
        {"do_lower_case": False},
        {"tokenize_chinese_chars": False},
        {"strip_accents": False},
        {"unk_token": "[MASK]"},
        {"cls_token": "[BEGIN]"},
        {"extra_special_tokens": ["river"]},
        {"tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "flood"},
        {"added_tokens_decoder": {"9": {"content": "river", "lstrip": False, "normalized": False, "rstrip": False}}},
    ],
    ids=str,
)
def test_a_tokenizer_is_read_as_transformers_reads_it(changes, tmp_path):
    """Whatever tokenizer_config.json says against tokenizer.json."""
    model = make_static(tmp_path, wordpiece(BertTokenizer))
    rewrite_json(Path(model, STATIC, "tokenizer_config.json"), changes)
    try:
        encoder = open_encoder(model)
    except Exception:
        with pytest.raises(ModelError):
            StaticQueries.open(model)
        return
    queries = StaticQueries.open(model)
    for text in TEXTS:
        assert_same(queries.encode([text]), encode(encoder, [text], "query"))


STATIC = "query_0_SparseStaticEmbedding"


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision(stored, tmp_path):
    model = make_static(tmp_path)
    path = Path(model, STATIC, "model.safetensors")
    save_file({"weight": load_file(path)["weight"].to(stored)}, path)
    queries, encoder = open_both(model)
    assert_same(queries.encode(TEXTS[:4]), encode(encoder, TEXTS[:4], "query"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_table_is_refused_as_the_model_is(value, tmp_path):
    model = make_static(tmp_path)
    path = Path(model, STATIC, "model.safetensors")
    weights = load_file(path)["weight"]
    weights[7] = value
    save_file({"weight": weights}, path)
    queries, encoder = open_both(model)
    messages = []
    for refused in (lambda: queries.encode(["kabel", "lodan"]), lambda: encode(encoder, ["kabel", "lodan"], "query")):
        with pytest.raises(ModelError, match="text 1; its training diverged") as caught:
            refused()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert queries.encode([]).shape == (0, len(weights))


def test_what_is_damaged_is_said(tmp_path):
    model = make_static(tmp_path)
    path = Path(model, STATIC, "model.safetensors")
    save_file({"weight": load_file(path)["weight"][:-1]}, path)
    with pytest.raises(ModelError, match="its queries have 148 weights and their tokenizer has 149 tokens"):
        StaticQueries.open(model)
    path.write_bytes(b"torn")
    with pytest.raises(ModelError, match="the encoder of its queries cannot be loaded"):
        StaticQueries.open(model)


def test_other_models_are_left_to_sentence_transformers(backbone, tmp_path):
    assert StaticQueries.open(backbone) is None
    load_encoder(backbone, k=1, shift=0).save_pretrained(str(tmp_path / "mlm"))
    assert StaticQueries.open(str(tmp_path / "mlm")) is None
    model = Path(make_static(tmp_path))
    for file, changes in {
        "config_sentence_transformers.json": {"max_active_dims": 2},
        "modules.json": None,
        "router_config.json": {"structure": {"query": [STATIC, STATIC], "document": []}},
        f"{STATIC}/config.json": {"path": "idf.json"},
        f"{STATIC}/model.safetensors": None,
    }.items():
        assert StaticQueries.open(str(model)) is not None
        kept = (model / file).read_bytes()
        if changes is None:
            (model / file).unlink()
        else:
            rewrite_json(model / file, changes)
        assert StaticQueries.open(str(model)) is None
        (model / file).write_bytes(kept)
