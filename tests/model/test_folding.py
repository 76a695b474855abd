import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from anysplade import ModelError, OptionError, TrainingConfig, inspect_head, load_encoder, rescale_head, train
from anysplade.model.calibration import calibrate
from anysplade.model.checkpoints import load_masked_lm
from anysplade.model.encoder import build_encoder, open_encoder
from anysplade.model.encoding import encode
from anysplade.model.folding import fold_head, plan_folding
from anysplade.model.head import DEAD, find_head, live_terms
from anysplade.model.modules import term_names
from tiny import make_backbone
from vocabularies import byte_level, make_cased, sentence_pieces, word_pieces

TEXTS = ["going py ( Py )", "the Going, goes 11 pyIN", "é\n(py)", ""]


@pytest.fixture(scope="module", params=["roberta", "modernbert", "xlm-roberta"])
def cased(request, tmp_path_factory):
    """A backbone of a cased vocabulary."""
    folder = tmp_path_factory.mktemp("cased") / request.param
    tokenizer = sentence_pieces() if request.param == "xlm-roberta" else byte_level()
    return make_cased(request.param, folder, tokenizer)


def folded(tokenizer, by="case", mute=False):
    """Each token with the one whose dimension it has, where that is another, or None."""
    backend = tokenizer.backend_tokenizer
    made, terms = plan_folding(tokenizer, backend.get_vocab_size(), by, mute)
    name, new_name = backend.id_to_token, made.backend_tokenizer.id_to_token
    assert [made.convert_tokens_to_ids(new_name(id_)) for id_ in range(len(terms))] == list(range(len(terms)))
    return {name(id_): None if term < 0 else new_name(term) for id_, term in enumerate(terms.tolist()) if id_ != term}


def test_byte_level():
    tokenizer = byte_level()
    assert folded(tokenizer) == {
        "p": "p", "T": "t", "I": "i", "N": "n", "G": "g", "Py": "py", "ĠP": "Ġp", "ĠPy": "Ġpy", "ĠG": "Ġg", "ĠGo": "Ġgo",
        "IN": "in", "ING": "ing",
    }  # fmt: skip
    made, _ = plan_folding(tokenizer, len(tokenizer), "case", mute=False)
    forms = ("py", " py", "Py", " PY", "\npy", "(py", "é(PY)")
    assert [made.tokenize(form)[-1 - form.endswith(")")] for form in forms] == ["Ġpy"] * len(forms)
    assert made.tokenize("gopyIN")[-2:] == ["py", "in"]  # pieces stay pieces
    assert made.tokenize("") == []


def test_letters_without_case_are_left_alone():
    assert folded(sentence_pieces()) == {"▁Py": "▁py"}
    for tokenizer in (byte_level(), sentence_pieces()):
        made, _ = plan_folding(tokenizer, len(tokenizer), "case", mute=False)
        for text in ("你好", " كتاب (你好)", "第你１，ำ"):
            assert made(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_word_pieces():
    found = {"Python": "python", "PYTHON": "python", "##ING": "##ing", "Go": "go", "Café": "café"}
    assert folded(word_pieces()) == found
    assert plan_folding(word_pieces(), 3, "case", mute=False)[1].tolist() == [0, 1, 2]  # a head that is narrower
    assert folded(word_pieces(), "stem") == found | {"links": "link", "Linking": "link"}
    made, _ = plan_folding(word_pieces(), 23, "case", mute=False)
    assert made.tokenize("LINKing CAFÉ") == ["linking", "café"]  # which was Linking


def test_tokens_that_were_added_stay(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_tokens(["py", "PYTHON"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<Q>"]})
    made, terms = plan_folding(tokenizer, len(tokenizer), "case", mute=False)
    made.save_pretrained(tmp_path)
    for folded_ in (made, AutoTokenizer.from_pretrained(tmp_path)):
        assert folded_.all_special_ids == tokenizer.all_special_ids
        for text, added in (("<Q>PYTHON(py", ["<Q>", "PYTHON", "py"]), ("gPYTHON", ["PYTHON"])):
            ids = folded_(text, add_special_tokens=False)["input_ids"]
            assert [token for token in folded_.convert_ids_to_tokens(ids) if token in folded_.get_added_vocab()] == added
            assert (terms[ids] == ids).all()


def test_bytes_stay():
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: id_ for id_, token in enumerate(["<unk>", "▁", "P", "y", "▁P", "▁Py", *alphabet])}
    merges = [("▁", "P"), ("▁P", "y")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    made, _ = plan_folding(tokenizer, len(tokenizer), "case", mute=False)
    assert made.tokenize("PY漢") == ["▁py", *tokenizer.tokenize("漢")[1:]]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("pPyYgGoO iInN1(),.\n\0éÉßẞİﬁ²́漢ｐ\u200d😀")))
@pytest.mark.parametrize("tokenizer", [byte_level(), sentence_pieces(), word_pieces()], ids=["bytes", "pieces", "words"])
def test_no_text_has_a_term_that_is_off(tokenizer, text):
    made, terms = plan_folding(tokenizer, len(tokenizer), "case", mute=False)
    ids = made(text)["input_ids"]
    assert (terms[ids] == ids).all()
    assert made(normalizers.Lowercase().normalize_str(text))["input_ids"] == ids


def test_muted():
    gone = {token for token, kept in folded(byte_level(), "none", mute=True).items() if kept is None}
    assert gone == {"<pad>", "<s>", "</s>", "<unk>", "<mask>", "(", ")", "Ġ(", "Ġ)", ".", ",", "!"}  # and not +


def test_the_record_by_hand(tmp_path):
    """Of 23 terms three forms of python, and two of go, of café and of ##ing are one; five are special, and ( ) , punctuation."""
    model, tokenizer = load_masked_lm(make_cased("bert", tmp_path, word_pieces()))
    fold_head(model, tokenizer, "case", mute=True)
    assert model.config.anysplade["folding"] == {"by": "case", "mute": True, "groups": 4, "folded": 5, "muted": 8, "live": 10}


def test_only_the_bias_changes(cased):
    model, tokenizer = load_masked_lm(cased)
    weights = {name: tensor.clone() for name, tensor in model.named_parameters() if "bias" not in name}
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        before = model(ids).logits
        made = fold_head(model, tokenizer, "case", mute=True)
        after = model(ids).logits
    live = live_terms(model)
    dead = torch.ones(len(tokenizer), dtype=torch.bool)
    dead[live] = False
    assert torch.equal(after[..., live], before[..., live])
    assert (after[..., dead] < DEAD / 2).all()
    assert {name for name, _ in model.named_parameters() if "bias" not in name} == weights.keys()  # what is tied stays tied
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in weights.items())
    done = model.config.anysplade["folding"]
    assert done["live"] == len(live) == len(tokenizer) - done["folded"] - done["muted"]
    assert made.special_tokens_map == tokenizer.special_tokens_map
    assert made.all_special_ids == tokenizer.all_special_ids


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_the_checkpoint_is_stock(cased, tmp_path, pooling):
    encoder, _ = build_encoder(cased, 2, 0.1, fold="case", mute=True, pooling=pooling)
    encoder.save_pretrained(str(tmp_path / "saved"))
    stock, fused = SparseEncoder(str(tmp_path / "saved")), open_encoder(tmp_path / "saved")
    rows = [model.encode(TEXTS, convert_to_tensor=True).to_dense() for model in (stock, fused, encoder)]
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(rows[1], rows[2])
    live = live_terms(stock[0].model)
    assert rows[0].count_nonzero() == rows[0][:, live].count_nonzero() > 0
    assert encode(fused, TEXTS, "document").nnz == rows[0].count_nonzero()
    names = term_names(fused)
    assert names[stock.tokenizer.convert_tokens_to_ids("▁py" if "xlm" in cased else "Ġpy")] == "py"


def test_calibration_measures_the_terms_that_are_left(cased, tmp_path):
    model, tokenizer = load_masked_lm(cased)
    tokenizer = fold_head(model, tokenizer)
    chosen = calibrate(model, tokenizer)
    assert chosen.before.logit_percentiles["0.1"] > -100
    assert chosen.before.document_similarity < 1
    rescale_head(model, chosen.k, chosen.shift)
    assert len(live_terms(model)) == model.config.anysplade["folding"]["live"]
    assert model.config.anysplade["k"] == chosen.k
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    report = inspect_head(tmp_path / "saved")
    assert report.live < report.vocabulary
    assert report.folding["by"] == "case"
    assert report.rescaled["k"] == chosen.k
    assert report.probe.positive_share == pytest.approx(chosen.after.positive_share, abs=1e-3)
    assert min(report.probe.query_active_dims, report.probe.document_active_dims) > 0.5


@pytest.mark.parametrize("factor", [0.05, 1, 20])
def test_a_folded_head_is_calibrated_whatever_its_scale_and_level(cased, factor):
    model, tokenizer = load_masked_lm(cased)
    tokenizer = fold_head(model, tokenizer, mute=True)
    one = calibrate(model, tokenizer)
    rescale_head(model, 1 / factor, shift=-30.0)
    chosen = calibrate(model, tokenizer)
    assert chosen.k == pytest.approx(factor * one.k, rel=1e-3)
    assert chosen.after.positive_share == pytest.approx(one.after.positive_share, abs=1e-3)
    assert chosen.after.document_similarity == pytest.approx(one.after.document_similarity, abs=1e-3)
    assert chosen.after.document_similarity < chosen.before.document_similarity
    assert min(chosen.after.query_active_dims, chosen.after.document_active_dims) >= 3
    rescale_head(model, chosen.k, chosen.shift)
    assert len(live_terms(model)) == model.config.anysplade["folding"]["live"]
    again = calibrate(model, tokenizer)
    assert (again.k, again.shift) == pytest.approx((1, 0), abs=0.01)


def test_queries_without_a_model_are_read_alike(cased):
    encoder, _ = build_encoder(cased, 1, 0, fold="case", query_encoder="idf", idf_texts=["py", "going"])
    rows = encoder.encode_query(["PY", "py", " Py"], convert_to_tensor=True).to_dense()
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert set(rows[0].nonzero()[:, 0].tolist()) <= set(live_terms(encoder[0].sub_modules["document"][0].model).tolist())


def test_training_leaves_dead_rows_dead(cased, tmp_path):
    pairs = [{"query": f"py {word}", "positive": f"going {word} ({word})"} for word in ("go", "in", "the", "11", "Py", "Go", "1")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs * 3))
    options = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "max_length": 16, "fold": "case", "mute": True}
    trained = train(TrainingConfig(cased, str(tmp_path / "pairs.jsonl"), output=str(tmp_path / "run"), **options))
    encoder = open_encoder(trained.model)
    assert len(live_terms(encoder[0].model)) == encoder[0].model.config.anysplade["folding"]["live"]
    assert trained.config["fold"] == "case"
    assert trained.query_active_dims > 0


def test_refusals(cased, backbone, tmp_path):
    model, tokenizer = load_masked_lm(cased)
    assert fold_head(model, tokenizer, "none") is tokenizer
    assert live_terms(model) is None
    fold_head(model, tokenizer)
    with pytest.raises(OptionError, match="was folded before"):
        fold_head(model, tokenizer, "stem")
    with pytest.raises(OptionError, match=r"one form of each word already \(uncased\)"):
        fold_head(*load_masked_lm(backbone))
    with pytest.raises(OptionError, match="have one weight per token, and tokens are not stems"):
        TrainingConfig(cased, "data", output="run", query_encoder="idf", fold="stem")
    load_encoder(cased, 1, 0).save_pretrained(str(tmp_path / "encoder"))
    with pytest.raises(OptionError, match="fold the backbone instead"):
        build_encoder(tmp_path / "encoder", fold="case")


def test_a_head_without_a_bias_cannot_be_folded(tmp_path):
    folder = make_cased("modernbert", tmp_path / "model", byte_level(), decoder_bias=False)
    with pytest.raises(ModelError, match="no bias, so no term can be switched off"):
        fold_head(*load_masked_lm(folder))


def test_what_follows_the_projection_cannot_be_folded(cased):
    model, tokenizer = load_masked_lm(cased)
    bias = find_head(model).bias.clone()
    find_head(model).decoder.register_forward_hook(lambda module, inputs, output: output.log_softmax(dim=-1))
    with pytest.raises(ModelError, match="not one projection of its hidden states"):
        fold_head(model, tokenizer)
    assert torch.equal(find_head(model).bias, bias)
    assert "anysplade" not in model.config.to_dict()


def test_other_weights_than_the_config_says_are_refused(cased, tmp_path):
    model, tokenizer = load_masked_lm(cased)
    tokenizer = fold_head(model, tokenizer)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    name = next(name for name in weights if name in ("lm_head.bias", "decoder.bias"))
    weights[name] = weights[name] + 1e4
    save_file(weights, tmp_path / "saved" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="terms left, and its head has"):
        load_masked_lm(tmp_path / "saved")
    AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")


def test_unfolded_models_are_as_they_were(tmp_path):
    model, _ = load_masked_lm(make_backbone("bert", tmp_path / "bert"))
    assert live_terms(model) is None
    modules = [Transformer(str(tmp_path / "bert"), transformer_task="fill-mask"), SpladePooling("max")]
    stock, ours = SparseEncoder(modules=modules), load_encoder(tmp_path / "bert", 1, 0)
    rows = [encoder.encode(["kabel lodan"], convert_to_tensor=True).to_dense() for encoder in (stock, ours)]
    torch.testing.assert_close(*rows)
