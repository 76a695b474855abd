import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, SparseMultipleNegativesRankingLoss, SpladeLoss
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder, SpladePooling
from transformers import AutoModelForMaskedLM, GPT2Config, GPT2LMHeadModel

from anysplade import ModelError, OptionError, load_encoder
from anysplade.model.encoder import build_encoder, open_encoder, open_masked_lm
from anysplade.model.fused import fuse_pooling, is_fused, unfuse_pooling
from anysplade.model.modules import is_splade, masked_lm, term_names
from architectures import ARCHITECTURES
from tiny import SPECIAL, WORDS, make_backbone, make_lexical

TEXTS = ["kabel lodan mifil nugor", "pehan", "", "not a word of the vocabulary"]


def dense(encoder, texts=TEXTS):
    return encoder.encode(texts, convert_to_sparse_tensor=False)


def test_untouched_is_what_sentence_transformers_loads(backbone):
    encoder = load_encoder(backbone, k=1, shift=0, fused=False)
    assert type(encoder) is SparseEncoder
    torch.testing.assert_close(dense(encoder), dense(SparseEncoder(backbone)))


@pytest.mark.parametrize("fused", [True, False])
def test_the_vocabulary_is_known_before_the_first_text(fused, backbone):
    for encoder in (load_encoder(backbone, fused=fused), open_encoder(backbone, fused=fused)):
        assert encoder.get_embedding_dimension() == len(SPECIAL + WORDS)


def test_calibration_is_on_by_default(backbone):
    raw, calibrated = (load_encoder(backbone, **options) for options in ({"k": 1, "shift": 0}, {}))
    assert (dense(calibrated) > 0).sum() < (dense(raw) > 0).sum()
    assert masked_lm(calibrated).config.anysplade["shift"] > 0


@pytest.mark.parametrize(
    "architecture", ["albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta"]
)
def test_fused_is_the_same_and_leaves_the_model_stock(architecture, tmp_path):
    assert architecture in ARCHITECTURES
    encoder = load_encoder(make_backbone(architecture, tmp_path / "in"), k=2, shift=0.5)
    assert is_fused(encoder)
    fused = dense(encoder)
    logits = masked_lm(encoder)(input_ids=torch.arange(8).reshape(1, 8)).logits
    assert logits.shape[-1] == encoder.get_embedding_dimension()
    encoder.save_pretrained(str(tmp_path / "out"))
    torch.testing.assert_close(dense(SparseEncoder(str(tmp_path / "out"))), fused, rtol=1e-4, atol=1e-5)
    AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    unfuse_pooling(encoder)
    torch.testing.assert_close(dense(encoder), fused, rtol=1e-4, atol=1e-5)


def test_gradients_through_the_fused_encoder(tmp_path):
    # Without dropout, which would draw anew for the second pass; in training mode, as the stock pooling
    # works in place otherwise and has no gradient; in float64, where near-ties are decided alike.
    still = make_backbone("bert", tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    encoder = load_encoder(still, k=2, shift=0.5).double().train()
    features = encoder.preprocess(TEXTS)
    gradients = []
    for switch in (fuse_pooling, unfuse_pooling):
        switch(encoder)
        encoder.zero_grad()
        encoder(dict(features))["sentence_embedding"].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("pooling, activation", [("sum", "relu"), ("sum", "log1p_relu"), ("max", "log1p_relu")])
def test_the_other_poolings_are_fused_too(backbone, pooling, activation):
    transformer = Transformer(backbone, transformer_task="fill-mask")
    encoder = SparseEncoder(modules=[transformer, SpladePooling(pooling, activation_function=activation)])
    stock = dense(encoder)
    assert fuse_pooling(encoder)
    torch.testing.assert_close(dense(encoder), stock, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    still = make_backbone("bert", tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    gradients = []
    for checkpointing in (False, True):
        encoder = load_encoder(still).train()
        if checkpointing:
            masked_lm(encoder).activation_checkpointing_enable()
        encoder(encoder.preprocess(TEXTS))["sentence_embedding"].sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_large_batches_by_gradient_caching(tmp_path):
    """CachedSpladeLoss encodes twice, without and with gradients, in mini-batches."""
    still = make_backbone("bert", tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    gradients = []
    for fused in (True, False):
        encoder = load_encoder(still, fused=fused).train()
        ranking = SparseMultipleNegativesRankingLoss(encoder)
        weights = {"document_regularizer_weight": 1e-3, "query_regularizer_weight": 1e-3}
        for loss in (SpladeLoss(encoder, ranking, **weights), CachedSpladeLoss(encoder, ranking, **weights, mini_batch_size=2)):
            encoder.zero_grad()
            losses = loss([encoder.preprocess(TEXTS), encoder.preprocess(TEXTS[::-1])], None)
            sum(losses.values()).backward()
            gradients.append({name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_a_compiled_encoder_gives_the_same(backbone):
    encoder = load_encoder(backbone, k=2, shift=0.5)
    expected = dense(encoder)
    encoder.compile(backend="eager")
    torch.testing.assert_close(dense(encoder), expected, rtol=1e-4, atol=1e-5)


def test_a_head_that_cannot_be_fused_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    encoder = load_encoder(make_backbone("esm", tmp_path, token_dropout=False), k=1, shift=0)
    assert "not fused" in caplog.text
    assert not is_fused(encoder)


def test_a_saved_encoder_keeps_its_calibration(backbone, tmp_path):
    encoder = load_encoder(backbone, k=2, shift=0.5)
    encoder.save_pretrained(str(tmp_path))
    again = load_encoder(tmp_path)
    torch.testing.assert_close(dense(again), dense(encoder), rtol=1e-4, atol=1e-5)


def test_what_is_no_masked_lm_is_refused(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    for load in (load_encoder, open_encoder):
        with pytest.raises(ModelError, match=r"'gpt2' is a decoder, .* and can have no MLM head"):
            load(tmp_path)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_opened_in_single(stored, backbone, tmp_path):
    """Backbones and saved encoders, for training and for encoding."""
    half = load_encoder(backbone).to(stored)
    half.save_pretrained(str(tmp_path / "encoder"))
    masked_lm(half).save_pretrained(tmp_path / "backbone")
    half.tokenizer.save_pretrained(tmp_path / "backbone")
    static = build_encoder(backbone, query_encoder="static", idf_texts=["kabel lodan"])[0].to(stored)
    static.save_pretrained(str(tmp_path / "static"))
    for folder in ("encoder", "backbone", "static"):
        for load in (load_encoder, open_encoder):
            assert {p.dtype for p in load(tmp_path / folder).parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_encoders_are_fused_too(dtype, backbone):
    encoder = load_encoder(backbone, k=1, shift=0, fused=False).to(dtype)
    assert fuse_pooling(encoder)


@pytest.fixture(scope="module")
def dense_folder(backbone, tmp_path_factory):
    """A SentenceTransformer on the body of a masked LM."""
    folder = tmp_path_factory.mktemp("dense")
    body = Transformer(backbone)
    SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension())]).save_pretrained(str(folder))
    return folder


def test_a_dense_model_is_called_what_it_is(dense_folder):
    for load in (load_encoder, open_encoder, open_masked_lm):
        with pytest.raises(
            ModelError, match=r"a dense embedding model \(BertModel, 2 layers, vocabulary 149\); it has no MLM head"
        ):
            load(dense_folder)


def test_a_body_without_a_head_is_refused(backbone, tmp_path):
    model = masked_lm(load_encoder(backbone))
    model.base_model.save_pretrained(tmp_path)
    load_encoder(backbone).tokenizer.save_pretrained(tmp_path)
    for load in (load_encoder, open_encoder, open_masked_lm):
        with pytest.raises(ModelError, match=r"an encoder \(BertModel, .* no trained MLM head .*; `anysplade head .* gives it one"):
            load(tmp_path)


@pytest.mark.parametrize("query_encoder", ["mlm", "static"])
def test_a_saved_encoder_without_its_head_is_refused(query_encoder, backbone, tmp_path):
    build_encoder(backbone, query_encoder=query_encoder, idf_texts=["kabel lodan"])[0].save_pretrained(str(tmp_path))
    [weights] = [path for path in tmp_path.rglob("model.safetensors") if "Static" not in str(path)]
    kept = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("cls.")}
    save_file(kept, weights, metadata={"format": "pt"})
    for load in (load_encoder, open_encoder, open_masked_lm):
        with pytest.raises(ModelError, match="no trained MLM head"):
            load(tmp_path)


def test_sparse_encoders_that_are_not_splade_are_named(dense_folder, tmp_path):
    SparseEncoder(str(dense_folder)).save_pretrained(str(tmp_path))
    assert not is_splade(open_encoder(tmp_path))
    for load in (load_encoder, open_masked_lm):
        with pytest.raises(ModelError, match=r"another kind \(Transformer, Pooling, SparseAutoEncoder\): only SPLADE"):
            load(tmp_path)


def test_a_sparse_head_in_a_plain_folder_stays_as_it_is(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = make_lexical(tmp_path)
    texts = {"queries": ["kabel lodan", "mifil nugor"], "documents": ["kabel rajim lodan sobel", "mifil tucor nugor pehan"]}
    encoder = load_encoder(folder, **texts)
    assert not hasattr(masked_lm(encoder).config, "anysplade")
    torch.testing.assert_close(dense(encoder), dense(open_encoder(folder)))
    assert "already sparse: use it as it is" in caplog.text
    assert masked_lm(load_encoder(folder, k=2, shift=0.5)).config.anysplade["k"] == 2


def test_a_saved_encoder_reads_more_up_to_its_positions(backbone, tmp_path):
    load_encoder(backbone, max_length=10).save_pretrained(str(tmp_path))
    assert open_encoder(tmp_path).max_seq_length == 10
    assert open_encoder(tmp_path, max_length=20).max_seq_length == 20
    assert open_encoder(tmp_path, max_length=64).max_seq_length == 64
    assert load_encoder(tmp_path, max_length=64).max_seq_length == 64
    for opened in (load_encoder, open_encoder):
        with pytest.raises(OptionError, match=r"has positions for 64 tokens, and `max_length` is 65; give at most 64"):
            opened(tmp_path, max_length=65)
    with pytest.raises(OptionError, match="at least 3 tokens"):
        open_encoder(tmp_path, max_length=2)


@pytest.mark.parametrize(
    "architecture, sizes, most",
    [
        ("roberta", {"pad_token_id": 1, "max_position_embeddings": 66}, 64),
        ("mpnet", {"pad_token_id": 1}, 62),
        ("distilbert", {}, 64),
        ("modernbert", {}, 64),
        ("funnel", {}, None),
    ],
)
def test_no_more_tokens_than_positions(architecture, sizes, most, tmp_path):
    folder = make_backbone(architecture, tmp_path, **sizes)
    text = " ".join(WORDS)
    encoder = load_encoder(folder, k=1, shift=0, max_length=most or 140)
    assert encoder.preprocess([text])["input_ids"].shape == (1, most or 140)
    assert encoder.encode([text]).shape == (1, 149)
    if most:
        with pytest.raises(OptionError, match=f"give at most {most}$"):
            load_encoder(folder, max_length=most + 1)


def test_length(backbone):
    assert load_encoder(backbone, max_length=5).max_seq_length == 5
    with pytest.raises(OptionError, match="at least 3 tokens"):
        load_encoder(backbone, max_length=2)


def test_every_term_has_a_name_of_its_own(backbone, tmp_path):
    assert term_names(open_encoder(backbone)) == SPECIAL + WORDS
    padded = open_encoder(make_backbone("bert", tmp_path / "padded", vocab_size=160))
    count = len(SPECIAL + WORDS)
    assert term_names(padded) == SPECIAL + WORDS + [f"[term:{term}]" for term in range(count, 160)]
    assert term_names(padded) is term_names(padded)


@pytest.mark.parametrize("query_encoder", ["idf", "static"])
def test_queries_by_token_need_a_head_of_the_tokenizers_size(query_encoder, tmp_path):
    backbone = make_backbone("bert", tmp_path / "padded", vocab_size=160)
    with pytest.raises(OptionError, match="160 rows and the tokenizer 149 tokens"):
        build_encoder(backbone, 1, 0, query_encoder=query_encoder, idf_texts=["kabel"])


def test_the_terms_of_an_autoencoder_are_no_tokens(backbone):
    transformer = Transformer(backbone)
    modules = [transformer, Pooling(32), SparseAutoEncoder(32, hidden_dim=64, k=4, k_aux=8)]
    assert term_names(SparseEncoder(modules=modules))[:2] == ["[term:0]", "[term:1]"]


@pytest.mark.parametrize("fused", [True, False])
def test_the_width_of_vectors_is_known_before_the_first_text(fused, backbone):
    encoder = open_encoder(backbone, fused=fused)
    assert encoder.get_embedding_dimension() == encoder.encode(["kabel"], convert_to_sparse_tensor=False).shape[1] == 149
