import json
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MobileBertConfig,
    MobileBertForMaskedLM,
    PreTrainedTokenizerFast,
)

from anysplade import ModelError, OptionError, inspect_head, load_encoder, rescale_head
from anysplade.model.encoder import open_encoder
from anysplade.model.head import Probe, find_head, load_masked_lm, measure_logits, summarize_probe, usable_positions
from anysplade.model.saved import resolve_model
from architectures import ARCHITECTURES, VOCABULARY, small_model
from tiny import make_backbone, make_tokenizer

TEXTS = ["kabel lodan", "mifil nugor pehan rajim sobel"], ["tucor kadan lofil migor", "nuhan pejim"]


def run(model, ids):
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    hidden = out.hidden_states if out.get("hidden_states") is not None else out.encoder_hidden_states
    return out.logits.detach(), [h.detach() for h in hidden]


@pytest.fixture(scope="module")
def ids():
    return torch.randint(5, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k, shift", [(2.5, 1.25), (1.0, 3.0)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rescaling_is_exact_and_survives_the_disk(architecture, k, shift, ids, tmp_path):
    model = small_model(architecture)
    head = find_head(model)
    if not head.biases:
        k, shift = 2.5, 0.0
    tied = head.decoder.weight is model.get_input_embeddings().weight
    before, hidden = run(model, ids)

    assert rescale_head(model, k=k, shift=shift) is model
    after, hidden_after = run(model, ids)
    scale = before.abs().max().item()
    torch.testing.assert_close(after, before / k - shift, rtol=0, atol=2e-6 * max(1, scale))
    assert all(torch.equal(a, b) for a, b in zip(hidden, hidden_after, strict=True))
    assert (find_head(model).decoder.weight is model.get_input_embeddings().weight) == (tied and k == 1)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    loaded.tie_weights()
    assert torch.equal(run(loaded, ids)[0], after)
    record = loaded.config.anysplade
    assert (record["k"], record["shift"]) == (k, shift)
    for bias in find_head(loaded).biases:
        assert bias.abs().max() > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tensor_has_one_value_under_all_its_names(architecture, ids, tmp_path):
    model = small_model(architecture)
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    rescale_head(model, 2, 0)
    decoder = find_head(model).decoder.weight
    alone = {name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor is decoder}
    groups = [kept for group in names.values() if len(kept := sorted({*group} - alone, key=len)) > 1]
    rates = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().mean().backward()
    rates.step()
    if architecture == "funnel":
        model.get_input_embeddings().weight.data[0] = 0
    trained = run(model, ids)[0]
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[name], written[group[0]]) for group in groups for name in group)
    assert alone <= written.keys()
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(run(loaded, ids)[0], trained)

    # Earlier versions, and others, wrote the bias that the logits do not have as it was before the training.
    biases = [group[0] for group in groups if group[0].endswith(".bias")]
    with torch.no_grad():
        for name in biases:
            loaded.get_parameter(name).add_(1)
    rescale_head(loaded, 1, 0.5 * bool(biases))
    loaded.save_pretrained(tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    for group in groups:
        assert all(torch.equal(again[name], written[name] - 0.5 * (group[0] in biases)) for name in group)


@pytest.mark.parametrize("opened", [load_masked_lm, load_encoder, open_encoder])
@pytest.mark.parametrize("tied", [True, False])
def test_a_bias_that_was_saved_with_two_values_is_the_one_of_the_logits(opened, tied, ids, tmp_path):
    model = small_model("roberta", pad_token_id=1, max_position_embeddings=66, tie_word_embeddings=False)
    model.lm_head.decoder.weight = model.get_input_embeddings().weight
    logits = run(model, ids)[0]
    model.config.tie_word_embeddings = tied
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not torch.equal(state["lm_head.bias"], state["lm_head.decoder.bias"])
    model.save_pretrained(tmp_path / "old", state_dict=dict(state))
    make_tokenizer_of(VOCABULARY).save_pretrained(tmp_path / "old")
    loaded = opened(tmp_path / "old", **({"k": 1, "shift": 0} if opened is load_encoder else {}))
    (loaded[0] if isinstance(loaded, tuple) else loaded).save_pretrained(str(tmp_path / "new"))
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert torch.equal(written["lm_head.bias"], state["lm_head.decoder.bias"])
    assert torch.equal(written.get("lm_head.decoder.bias", written["lm_head.bias"]), written["lm_head.bias"])
    assert torch.equal(run(AutoModelForMaskedLM.from_pretrained(tmp_path / "new").eval(), ids)[0], logits)


@settings(max_examples=30, deadline=None)
@given(k=st.floats(0.01, 100), shift=st.floats(-50, 50), policy=st.sampled_from(["scale", "keep"]))
def test_any_k_and_shift(k, shift, policy):
    model = small_model("bert")
    ids = torch.arange(5, 21).reshape(2, 8)
    before, bias = run(model, ids)[0], find_head(model).bias.clone()
    rescale_head(model, k, shift, policy)
    expected = before / k - shift + (bias * (1 - 1 / k) if policy == "keep" else 0)
    torch.testing.assert_close(run(model, ids)[0], expected, rtol=1e-4, atol=1e-4 * max(1, 1 / k))


def test_k_1_keeps_tie_and_size():
    model = small_model("bert")
    size = sum(p.numel() for p in model.parameters())
    rescale_head(model, k=1, shift=2)
    assert model.config.tie_word_embeddings
    assert sum(p.numel() for p in model.parameters()) == size
    rescale_head(model, k=2, shift=0)
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    assert find_head(model).decoder.weight is not model.get_input_embeddings().weight


def test_k_1_shift_0_changes_nothing():
    model = small_model("bert")
    rescale_head(model, k=1, shift=0)
    assert not hasattr(model.config, "anysplade")


def test_twice_says_so_and_composes(ids, caplog):
    model = small_model("roberta")
    before = run(model, ids)[0]
    rescale_head(model, k=4, shift=1)
    with caplog.at_level(logging.WARNING):
        rescale_head(model, k=2, shift=-3)
    assert "was rescaled before (k=4, shift=1)" in caplog.text
    torch.testing.assert_close(run(model, ids)[0], (before / 4 - 1) / 2 + 3, rtol=0, atol=1e-4)
    assert model.config.anysplade["earlier"]["k"] == 4


@pytest.mark.parametrize("k", [0, -1, float("nan"), float("inf")])
def test_impossible_k(k):
    with pytest.raises(OptionError, match="k is"):
        rescale_head(small_model("bert"), k=k)


def test_impossible_shift_and_policy():
    with pytest.raises(OptionError, match="shift is nan"):
        rescale_head(small_model("bert"), shift=float("nan"))
    with pytest.raises(OptionError, match="'scale'"):
        rescale_head(small_model("bert"), bias="other")


def test_a_head_without_bias_cannot_shift(ids):
    model = small_model("modernbert", decoder_bias=False)
    before = run(model, ids)[0]
    with pytest.raises(ModelError, match="no bias, so it cannot be shifted"):
        rescale_head(model, k=2, shift=1)
    assert torch.equal(run(model, ids)[0], before)
    torch.testing.assert_close(run(rescale_head(model, k=2), ids)[0], before / 2)


def test_a_head_of_two_projections_is_refused_and_left_as_it_was(ids):
    config = MobileBertConfig(vocab_size=VOCABULARY, hidden_size=32, embedding_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = MobileBertForMaskedLM(config).eval()
    before = run(model, ids)[0]
    with pytest.raises(ModelError, match="not one projection"):
        rescale_head(model, k=2)
    assert torch.equal(run(model, ids)[0], before)
    assert model.config.tie_word_embeddings
    assert find_head(model).decoder.weight is model.get_input_embeddings().weight


def test_not_a_masked_lm(tmp_path):
    small = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"'gpt2' is a decoder, .* and can have no MLM head"):
        load_masked_lm(tmp_path / "gpt2")
    BertModel(BertConfig(**small)).save_pretrained(tmp_path / "headless")
    with pytest.raises(ModelError, match=r"no trained MLM head|cannot be loaded"):
        load_masked_lm(tmp_path / "headless")


def test_a_checkpoint_without_its_head_is_refused(backbone, tmp_path):
    model, tokenizer = load_masked_lm(backbone)
    model.bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no trained MLM head"):
        load_masked_lm(tmp_path)


def test_a_checkpoint_that_lacks_weights_of_its_body_is_refused(backbone, tmp_path):
    model, tokenizer = load_masked_lm(backbone)
    kept = {name: tensor for name, tensor in model.state_dict().items() if "layer.1.output" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks weights \(bert\.encoder\.layer\.1\.output.* is one of 4\)"):
        load_masked_lm(tmp_path)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_heads_are_measured_in_single_precision(stored, tmp_path):
    small_model("bert").to(stored).save_pretrained(tmp_path)
    make_tokenizer_of(VOCABULARY).save_pretrained(tmp_path)
    assert load_masked_lm(tmp_path)[0].dtype == torch.float32
    assert load_masked_lm(tmp_path, dtype="auto")[0].dtype == stored


def make_tokenizer_of(size, **names):
    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = list(state["model"]["vocab"])[:size]
    words += [f"word{i}" for i in range(size - len(words))]
    state["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    known = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)} | names
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), **{name: token for name, token in known.items() if token}
    )


@pytest.mark.parametrize("opened", [load_masked_lm, load_encoder, open_encoder])
class TestTokenizers:
    def save(self, folder, tokenizer=None, **sizes):
        small_model("bert", **sizes).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    def test_without_files(self, opened, tmp_path):
        with pytest.raises(ModelError, match="no tokenizer in it"):
            opened(self.save(tmp_path))

    @pytest.mark.parametrize("rows, tokens", [(99, 100), (9000, 149)])
    def test_of_another_vocabulary(self, opened, rows, tokens, tmp_path):
        with pytest.raises(ModelError, match="it is another model's"):
            opened(self.save(tmp_path, make_tokenizer_of(tokens), vocab_size=rows))

    @pytest.mark.parametrize("special", [True, False])
    def test_with_tokens_that_the_model_does_not_have(self, opened, special, tmp_path):
        tokenizer = make_tokenizer_of(VOCABULARY)
        folder = self.save(tmp_path / "plain", tokenizer)
        tokenizer.add_tokens(["[URL]", "[CODE]"], special_tokens=special)
        tokenizer.save_pretrained(folder)
        advice = r"go up to 100, and the model has 99 embeddings; call `model.resize_token_embeddings\(len\(tokenizer\)\)`"
        with pytest.raises(ModelError, match=advice):
            opened(folder)
        encoder = load_encoder(self.save(tmp_path / "encoder", make_tokenizer_of(VOCABULARY)))
        encoder.tokenizer.add_tokens(["[URL]", "[CODE]"], special_tokens=special)
        encoder.save_pretrained(str(tmp_path / "saved"))
        if opened is not load_masked_lm:
            with pytest.raises(ModelError, match=advice):
                opened(tmp_path / "saved")
        resized = AutoModelForMaskedLM.from_pretrained(folder)
        resized.resize_token_embeddings(len(tokenizer))
        resized.save_pretrained(folder)
        opened(folder)

    def test_of_a_padded_vocabulary(self, opened, tmp_path):
        opened(self.save(tmp_path, make_tokenizer_of(149), vocab_size=192))

    def test_without_a_pad_token(self, opened, tmp_path, caplog):
        folder = self.save(tmp_path, make_tokenizer_of(VOCABULARY, pad_token=None, eos_token="[SEP]"))
        loaded = opened(folder)
        tokenizer = loaded[1] if isinstance(loaded, tuple) else loaded.tokenizer
        assert tokenizer.pad_token == "[PAD]"  # the config's pad_token_id
        assert "no pad token, [PAD] is used" in caplog.text
        assert tokenizer(["kabel", "kabel lodan mifil"], padding=True)["attention_mask"][0][-1] == 0

    def test_with_nothing_to_pad_with(self, opened, tmp_path):
        nothing = dict.fromkeys(("pad_token", "eos_token", "sep_token", "unk_token"))
        folder = self.save(tmp_path, make_tokenizer_of(VOCABULARY, **nothing))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
        with pytest.raises(ModelError, match="no token to pad with"):
            opened(folder)

    def test_that_sets_no_limit(self, opened, tmp_path):
        small_model("roberta", vocab_size=VOCABULARY, pad_token_id=1).save_pretrained(tmp_path)
        make_tokenizer_of(VOCABULARY).save_pretrained(tmp_path)
        loaded = opened(tmp_path)
        tokenizer = loaded[1] if isinstance(loaded, tuple) else loaded.tokenizer
        assert tokenizer.model_max_length == 62
        if isinstance(loaded, tuple):
            measure_logits(*loaded, ["kabel"], ["kabel " * 200])
        else:
            loaded.encode(["kabel " * 200])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_usable_positions(architecture):
    model = small_model(architecture)
    length = usable_positions(model)
    if length is None:
        return
    assert 60 < length <= 64
    ids = 5 + torch.arange(length).reshape(1, -1) % 90
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("opened", [load_masked_lm, load_encoder, open_encoder])
def test_code_of_its_own_is_refused_in_one_line(opened, backbone, tmp_path):
    model, tokenizer = load_masked_lm(backbone)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForMaskedLM": "own.OwnForMaskedLM"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError, match="brings code of its own") as raised:
        opened(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "", " "])
def test_no_such_model(name):
    with pytest.raises(ModelError, match="no such model folder"):
        resolve_model(name)


def test_report_of_a_head(backbone):
    report = inspect_head(backbone, queries=TEXTS[0], documents=TEXTS[1])
    model, tokenizer = load_masked_lm(backbone)
    weight = model.get_output_embeddings().weight.detach()
    assert (report.architecture, report.vocabulary, report.width) == ("BertForMaskedLM", *weight.shape)
    assert (report.tied, report.bias, report.rescaled) == (True, True, None)
    assert report.frobenius_norm == pytest.approx(weight.norm().item())
    assert report.max_row_norm == pytest.approx(weight.norm(dim=1).max().item())

    vectors, tokens = [], []
    for texts in TEXTS:  # one text at a time: no padding
        rows = [model(**tokenizer(text, return_tensors="pt")).logits.detach()[0] for text in texts]
        tokens += rows
        vectors.append(torch.stack([row.max(0).values.relu().log1p() for row in rows]).numpy())
    logits = torch.cat(tokens).numpy()
    queries, documents = vectors
    assert report.probe.tokens == len(logits)
    assert report.probe.positive_share == pytest.approx((logits > 0).mean())
    assert report.probe.logit_percentiles["50"] == pytest.approx(np.median(logits), abs=1e-4)
    assert report.probe.query_active_dims == pytest.approx((queries > 0).sum(1).mean())
    assert report.probe.flops == pytest.approx(((queries > 0).mean(0) * (documents > 0).mean(0)).sum())
    assert report.probe.score_std == pytest.approx((queries @ documents.T).std(), rel=1e-4)
    json.dumps(report.to_dict())


def test_what_splade_starts_from_by_hand():
    """log1p(relu()) of the logits below gives queries (1, 0, 0), (0, 2, 0) and documents (2, 1, 0), (0, 2, 1)."""
    one, two = math.expm1(1), math.expm1(2)
    queries = np.array([[one, -1, 0], [-9, two, -1]], np.float32)
    documents = np.array([[two, one, -1], [0, two, one]], np.float32)
    report = summarize_probe(Probe(np.arange(-500, 501, dtype=np.float32), queries, documents, None))
    assert (report.queries, report.documents, report.tokens) == (2, 2, 1001)
    assert report.logit_percentiles["0.1"] == pytest.approx(-499)
    assert report.logit_percentiles["95"] == pytest.approx(450)
    assert report.positive_share == 500 / 1001
    assert (report.query_active_dims, report.document_active_dims) == (1, 2)
    assert report.flops == pytest.approx(0.5 * 0.5 + 0.5 * 1)  # sum over terms of P(in query) P(in document)
    # The scores are 2, 0 and 2, 4.
    assert (report.score_mean, report.score_std) == (pytest.approx(2), pytest.approx(2**0.5))
    assert report.document_similarity == pytest.approx(2 / 5)  # 2 / (√5 √5)
    # -log of the softmax at the diagonal: log(e² + e⁰) - 2 and log(e² + e⁴) - 4 are both log(1 + e⁻²).
    assert report.start_loss == pytest.approx(math.log1p(math.exp(-2)))
    assert report.chance == pytest.approx(math.log(2))
    assert sum(report.histogram["shares"]) == pytest.approx(1)
    assert (report.histogram["edges"][0], report.histogram["edges"][-1]) == (-500, 500)
    # Of three documents the empty one is like none: 2 / 5 in two of six ordered pairs.
    more = summarize_probe(Probe(queries, queries, np.concatenate([documents, -np.ones((1, 3), np.float32)]), None))
    assert more.document_similarity == pytest.approx(2 / 5 * 2 / 6)
    assert more.start_loss is None  # no query goes with it
    assert summarize_probe(Probe(queries, queries, documents[:1], None)).document_similarity == pytest.approx(0, abs=1e-6)


def test_a_loaded_model_is_probed_only_with_its_tokenizer(backbone):
    model, tokenizer = load_masked_lm(backbone)
    assert inspect_head(model).probe is None
    assert inspect_head(model, tokenizer).probe is not None


@pytest.mark.parametrize("policy", ["scale", "keep"])
def test_the_probe_foretells_the_rescaled_head(backbone, policy):
    model, tokenizer = load_masked_lm(backbone)
    foretold = summarize_probe(measure_logits(model, tokenizer, *TEXTS).affine(3.0, 0.7, policy))
    rescale_head(model, 3.0, 0.7, policy)
    measured = summarize_probe(measure_logits(model, tokenizer, *TEXTS))
    assert measured.query_active_dims == foretold.query_active_dims
    assert measured.score_std == pytest.approx(foretold.score_std, rel=1e-4)
    assert measured.logit_percentiles == pytest.approx(foretold.logit_percentiles, abs=1e-4)


def test_rescaling_half_precision(tmp_path):
    folder = make_backbone("bert", tmp_path / "bf16", dtype="bfloat16")
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.bfloat16)
    rescale_head(model, k=8, shift=1)
    assert find_head(model).decoder.weight.dtype == torch.bfloat16
