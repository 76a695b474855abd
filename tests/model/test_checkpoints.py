import json

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from anysplade import ModelError, load_encoder
from anysplade.model.checkpoints import load_masked_lm, usable_positions
from anysplade.model.encoder import open_encoder
from anysplade.model.measuring import measure_logits
from anysplade.model.saved import resolve_model
from architectures import ARCHITECTURES, VOCABULARY, small_model
from tiny import make_tokenizer_of


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
        with pytest.raises(ModelError, match="the tokenizer does not match the model"):
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
