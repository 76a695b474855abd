import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, SparseMultipleNegativesRankingLoss, SpladeLoss
from sentence_transformers.sparse_encoder.modules import SpladePooling
from transformers import AutoModelForMaskedLM, GPT2Config, GPT2LMHeadModel

from anysplade import ModelError, OptionError, load_encoder
from anysplade.encoder import fuse_pooling, masked_lm, open_encoder, unfuse_pooling
from architectures import ARCHITECTURES
from tiny import make_backbone

TEXTS = ["kabel lodan mifil nugor", "pehan", "", "not a word of the vocabulary"]


def dense(encoder, texts=TEXTS):
    return encoder.encode(texts, convert_to_sparse_tensor=False)


def test_untouched_is_what_sentence_transformers_loads(backbone):
    encoder = load_encoder(backbone, k=1, shift=0, fused=False)
    assert type(encoder) is SparseEncoder
    torch.testing.assert_close(dense(encoder), dense(SparseEncoder(backbone)))


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
    assert "forward" in encoder[0].__dict__
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
    assert "forward" not in encoder[0].__dict__


def test_a_saved_encoder_keeps_its_calibration(backbone, tmp_path):
    encoder = load_encoder(backbone, k=2, shift=0.5)
    encoder.save_pretrained(str(tmp_path))
    again = load_encoder(tmp_path)
    torch.testing.assert_close(dense(again), dense(encoder), rtol=1e-4, atol=1e-5)


def test_what_is_no_masked_lm_is_refused(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    for load in (load_encoder, open_encoder):
        with pytest.raises(ModelError, match="'gpt2' is not a masked LM"):
            load(tmp_path)


def test_half_precision_checkpoints_train_in_single(tmp_path):
    folder = make_backbone("bert", tmp_path, dtype=torch.bfloat16)
    assert masked_lm(load_encoder(folder)).dtype == torch.float32


def test_length(backbone):
    assert load_encoder(backbone, max_length=5).max_seq_length == 5
    with pytest.raises(OptionError, match="at least 3 tokens"):
        load_encoder(backbone, max_length=2)
