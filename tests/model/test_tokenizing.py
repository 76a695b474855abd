"""One tokenization gives what sentence-transformers' own preprocessing gives, for every kind of encoder."""

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder, SpladePooling
from transformers import BertTokenizerLegacy, DataCollatorWithFlattening

import anysplade.model.tokenizing as tokenizing
from anysplade import load_encoder
from anysplade.model.encoder import build_encoder
from anysplade.model.encoding import encode, encode_counted
from anysplade.model.tokenizing import TextReader, _Preprocessed, _Tokenized, count_truncated
from tiny import SPECIAL, WORDS, make_backbone, make_static

TEXTS = [
    "",
    "kabel",
    "🙂🙂",
    "\ud800 kabel",
    " ".join(WORDS) * 800,  # more than 100,000 words
    "[CLS] kabel [SEP] [MASK] lodan [PAD] [PAD]",
    "kabel lodan mifil nugor",
    "https://example.org/picture.png",
    " \n\t ",
    " ".join(WORDS[:62]),  # as long as the model reads
    " ".join(WORDS[:63]),
]
ROLES = ["query", "document"]


def plain(backbone, _):
    return load_encoder(backbone, k=1, shift=0)


def prompted(backbone, _):
    encoder = load_encoder(backbone, k=1, shift=0)
    encoder.prompts = {"query": "kabel lodan ", "document": "mifil "}
    return encoder


def without_mask(backbone, _):
    encoder = load_encoder(backbone, k=1, shift=0)
    encoder.tokenizer.model_input_names = ["input_ids", "token_type_ids"]
    return encoder


def on_the_left(backbone, _):
    encoder = load_encoder(backbone, k=1, shift=0)
    encoder.tokenizer.padding_side = "left"
    return encoder


def cut_on_the_left(backbone, _):
    encoder = load_encoder(backbone, k=1, shift=0)
    encoder.tokenizer.truncation_side = "left"
    return encoder


def flat(backbone, _):
    """Inputs as for flash attention, which needs a GPU: only their form is compared."""
    encoder = load_encoder(backbone, k=1, shift=0)
    encoder[0].can_flatten_inputs, encoder[0]._flatten_position_offset = True, 2
    names = ("return_seq_idx", "return_flash_attn_kwargs", "return_position_ids")
    encoder[0].data_collator = DataCollatorWithFlattening(**dict.fromkeys(names, True))
    return encoder


def slow(backbone, folder):
    encoder = load_encoder(backbone, k=1, shift=0)
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + [word.lower() for word in WORDS]))
    encoder[0].processor = BertTokenizerLegacy(str(folder / "vocab.txt"), model_max_length=64)
    return encoder


def autoencoder(backbone, _):
    """A dense model whose pooling leaves the prompt out, then a sparse autoencoder."""
    transformer = Transformer(backbone)
    width = transformer.get_embedding_dimension()
    modules = [transformer, Pooling(width, include_prompt=False), SparseAutoEncoder(width, 4 * width, 8)]
    return SparseEncoder(modules=modules, prompts={"query": "kabel lodan ", "document": ""})


def static(_, folder):
    return SparseEncoder(make_static(folder, prompt="kabel "))


def learned(_, folder):
    backbone = make_backbone("bert", folder / "backbone")
    return build_encoder(backbone, 1, 0, query_encoder="static", idf_texts=["kabel lodan"], max_length=20)[0]


KINDS = [plain, prompted, without_mask, on_the_left, cut_on_the_left, flat, slow, autoencoder, static, learned]


@pytest.fixture(params=KINDS, ids=lambda make: make.__name__)
def encoder(request, backbone, tmp_path):
    return request.param(backbone, tmp_path)


def clean(texts):
    return [text.replace("\ud800", "\ufffd") for text in texts]


@pytest.mark.parametrize("role", ROLES)
def test_inputs_are_those_of_sentence_transformers(role, encoder):
    texts = clean(TEXTS)
    read = TextReader(encoder, role).read(texts)
    assert isinstance(read, _Tokenized)  # nothing was preprocessed
    own = _Preprocessed(encoder, role, texts)
    if any(name in read.batch(np.arange(2)) for name in ("attention_mask", "cu_seq_lens_q")):
        assert read.lengths.tolist() == own.lengths.tolist()
    assert read.cut == count_truncated(encoder, TEXTS, role).texts > 0
    for batch in ([0], [4], [0, 1], [5, 3, 1], list(range(len(texts)))):
        got, expected = (one.batch(np.array(batch)) for one in (read, own))
        if role == "query" and len(batch) == 1 and not expected["input_ids"].numel():
            continue  # the tensor of no tokens has no type
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert got[name].dtype == value.dtype
                assert torch.equal(got[name], value), name
            else:
                assert got[name] == value


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("make", [plain, prompted, static, slow, autoencoder])
def test_vectors_and_counts_are_the_same_in_both_ways(make, role, backbone, tmp_path, monkeypatch):
    encoder = make(backbone, tmp_path)
    counted = encode_counted(encoder, TEXTS, role)
    assert counted.cut == count_truncated(encoder, TEXTS, role)
    monkeypatch.setattr(tokenizing, "_is_stock", lambda *_: False)
    expected = encode_counted(encoder, TEXTS, role)
    assert expected.cut == counted.cut
    np.testing.assert_allclose(counted.matrix.toarray(), expected.matrix.toarray(), rtol=1e-5, atol=1e-6)
    for text in TEXTS:
        np.testing.assert_allclose(
            encode(encoder, [text], role).toarray()[0], counted.matrix[TEXTS.index(text)].toarray()[0], rtol=1e-4, atol=1e-5
        )


def test_an_encoder_with_its_own_preprocessing_keeps_it(backbone):
    class Shouting(Transformer):
        def preprocess(self, inputs, **options):
            return super().preprocess([text.replace("kabel", "lodan") for text in inputs], **options)

    stock = load_encoder(backbone, k=1, shift=0, fused=False)
    own = SparseEncoder(modules=[Shouting(backbone, transformer_task="fill-mask"), SpladePooling()])
    texts = ["kabel mifil", "kabel", "nugor " * 100]
    got, cut = encode_counted(own, texts, "document")
    np.testing.assert_allclose(
        got.toarray(), encode(stock, [text.replace("kabel", "lodan") for text in texts], "document").toarray(), rtol=1e-4, atol=1e-5
    )
    assert cut == count_truncated(own, texts, "document") == count_truncated(stock, texts, "document")


def test_an_unknown_tokenization_is_found_out(backbone, monkeypatch):
    """Here the tokenizer pads differently than its attributes say."""
    encoder = load_encoder(backbone, k=1, shift=0)
    texts = ["kabel", "lodan mifil", ""]
    expected = encode(encoder, texts, "document").toarray()
    preprocess, pad = SparseEncoder.preprocess, torch.nn.functional.pad

    def padded(self, *given, **options):
        features = preprocess(self, *given, **options)
        return {name: pad(value, (0, 2)) if torch.is_tensor(value) else value for name, value in features.items()}

    monkeypatch.setattr(SparseEncoder, "preprocess", padded)
    assert isinstance(TextReader(encoder, "document").read(["kabel", "lodan"]), _Preprocessed)
    np.testing.assert_allclose(encode(encoder, texts, "document").toarray(), expected, rtol=1e-4, atol=1e-5)


def test_each_text_is_tokenized_once(backbone, monkeypatch):
    encoder = load_encoder(backbone, k=1, shift=0)
    texts = [f"{WORDS[i % 100]} {WORDS[i % 7]}" for i in range(1000)]
    seen = []
    call = type(encoder.tokenizer).__call__

    def counted(self, given, **options):
        seen.extend(given)
        return call(self, given, **options)

    monkeypatch.setattr(type(encoder.tokenizer), "__call__", counted)
    encode_counted(encoder, texts, "document")
    assert len(seen) <= len(texts) + 10  # the few that are read in both ways
