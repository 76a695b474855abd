import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from transformers import AutoModelForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2Model, T5Config, T5EncoderModel

from anysplade import (
    AnyspladeError,
    DataError,
    ModelError,
    OptionError,
    OutputError,
    TrainingConfig,
    inspect_head,
    load_encoder,
    train,
    train_head,
)
from anysplade._common.files import only_process
from anysplade.cli import main
from anysplade.cli.training import head_training_lines
from anysplade.model.fused import hidden_states
from anysplade.model.head import find_head
from anysplade.model.modules import masked_lm
from anysplade.training import head_trainer, head_training
from anysplade.training.head_trainer import HeadTrainer, layer_rates
from anysplade.training.head_training import sample_pieces
from anysplade.training.new_head import start_biases, token_counts, with_new_head
from architectures import small_model
from processes import room_for
from tiny import SPECIAL, WORDS, make_tokenizer

OPTIONS = {"steps": 8, "batch_size": 4, "max_length": 16, "learning_rate": 1e-2, "checkpoint_steps": 4}


def make_body(architecture, folder, **overrides):
    """Save a small random encoder without an MLM head, with its tokenizer; returns the folder as a string."""
    tokenizer = make_tokenizer()
    small_model(architecture, vocab_size=len(tokenizer), **overrides).base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    return make_body("bert", tmp_path_factory.mktemp("body") / "bert")


@pytest.fixture(scope="module")
def dense(body, tmp_path_factory):
    """A dense model of sentence-transformers."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    transformer = Transformer(body)
    SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())]).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def text(tmp_path):
    """A file with one text a line."""
    (tmp_path / "text.txt").write_text("".join(f"{WORDS[i]} {WORDS[i + 1]} {WORDS[i + 2]} {WORDS[i]}\n\n" for i in range(60)))
    return str(tmp_path / "text.txt")


def weights(folder):
    return AutoModelForMaskedLM.from_pretrained(folder).state_dict()


def in_a_folder_below(dense, folder):
    """The dense model as older versions of sentence-transformers saved it."""
    shutil.copytree(dense, folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "0_Transformer").mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(folder / "0_Transformer" / path.name)
    return str(folder)


@pytest.mark.parametrize("kind", ["bare", "dense", "dense in a folder below"])
def test_a_head_makes_a_stock_backbone(kind, body, dense, text, collection_folder, tmp_path):
    encoder = {"bare": body, "dense": dense}.get(kind) or in_a_folder_below(dense, tmp_path / "old")
    out = tmp_path / "backbone"
    result = train_head(encoder, text, out, **OPTIONS | {"steps": 60, "batch_size": 16})
    assert result.architecture == "BertForMaskedLM"
    assert result.texts == 60
    assert result.losses.keys() == {"named", "bag"}
    assert all(last < 0.9 * first for first, last in result.losses.values()), result.losses
    assert json.loads((out / "head.json").read_text()).items() >= json.loads(json.dumps(result.to_dict())).items()
    assert not (tmp_path / "backbone.parts").exists()
    assert str(out) in head_training_lines(result)[1]

    model = AutoModelForMaskedLM.from_pretrained(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before = with_new_head(body)[0].state_dict()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("cls.") and not name.endswith("decoder.weight")}

    assert inspect_head(out).tied
    assert not masked_lm(load_encoder(out, k="auto")).training
    trained = train(TrainingConfig(str(out), str(collection_folder), output=str(tmp_path / "run"), steps=2, batch_size=4))
    assert trained.steps == 2


@pytest.mark.parametrize("masked", [0.0, 1.0])
def test_the_loss_is_that_of_all_logits(masked, body, text, monkeypatch):
    monkeypatch.setitem(head_trainer.WEIGHTS, "masked", masked)
    model, tokenizer = with_new_head(body)
    model.eval()
    pieces = sample_pieces(text, 100, 100, 0)
    counts = token_counts(model, tokenizer, pieces, 16)
    start_biases(model, counts)
    batch = tokenizer([*pieces[:4], WORDS[0], f"{WORDS[5]} {WORDS[5]}"], padding=True, return_tensors="pt")
    ids, attention = batch["input_ids"], batch["attention_mask"]
    rarity = -(counts / counts.sum()).log()
    rarity[: len(SPECIAL)] = 0
    seen = []
    monkeypatch.setattr(
        head_trainer, "hidden_states", lambda model, **inputs: seen.append(inputs) or hidden_states(model, **inputs)
    )
    trainer = SimpleNamespace(special=torch.arange(len(SPECIAL)), mask_token=tokenizer.mask_token_id, rarity=rarity)
    torch.manual_seed(3)
    parts = HeadTrainer.loss_parts(trainer, model, ids, attention)
    assert list(parts) == [*(["masked"] if masked else []), "named", "bag"]

    torch.manual_seed(3)
    draw = torch.rand(ids.shape)
    words = ids >= len(SPECIAL)
    read = seen[0]["input_ids"]
    guessed, named = words & (draw < 0.2), words & (draw >= 0.8)
    assert guessed.any()
    assert named.any()
    assert torch.equal(read[~guessed], ids[~guessed])
    assert (read[guessed] == tokenizer.mask_token_id).any() == bool(masked)
    logits = model(input_ids=read, attention_mask=attention).logits
    chance = logits.log_softmax(dim=-1)
    if masked:
        torch.testing.assert_close(parts["masked"], -chance[guessed].gather(1, ids[guessed].unsqueeze(1)).mean())
    torch.testing.assert_close(parts["named"], -chance[named].gather(1, ids[named].unsqueeze(1)).mean())
    bags = []
    for row in range(3):  # half of the texts
        there = attention[row].bool()
        largest = logits[row, there].max(dim=0).values.log_softmax(dim=0)
        terms = sorted({int(id_) for id_ in ids[row, there] if id_ >= len(SPECIAL)})
        bags.append(-(rarity[terms] * largest[terms]).sum() / rarity[terms].sum())
    torch.testing.assert_close(parts["bag"], torch.stack(bags).mean())


def test_a_trained_encoder_learns_to_guess(body, text, tmp_path, monkeypatch):
    monkeypatch.setitem(head_trainer.WEIGHTS, "masked", 1.0)
    result = train_head(body, text, tmp_path / "out", **OPTIONS | {"steps": 40}, encoder_learning_rate=1e-3, layer_decay=0.1)
    assert list(result.losses) == ["masked", "named", "bag"]
    before, after = with_new_head(body)[0].state_dict(), weights(tmp_path / "out")
    moved = [
        (before[name] - after[name]).abs().mean()
        for layer in (0, 1)
        for name in before
        if name == f"bert.encoder.layer.{layer}.output.dense.weight"
    ]
    assert 0 < moved[0] < moved[1] / 3


@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_a_killed_training_ends_as_an_uninterrupted_one(rate, body, text, tmp_path, monkeypatch):
    whole = train_head(body, text, tmp_path / "whole", **OPTIONS, encoder_learning_rate=rate)
    stock, steps = HeadTrainer.compute_loss, []

    def killed(*args, **kwargs):
        if len(steps) == 6:
            raise KeyboardInterrupt
        steps.append(1)
        return stock(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(HeadTrainer, "compute_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            train_head(body, text, tmp_path / "out", **OPTIONS, encoder_learning_rate=rate)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.parts" / "checkpoint-4").exists()
    with pytest.raises(OutputError, match=r"out\.parts: .*other options \(seed 0, now 1\).* or remove"):
        train_head(body, text, tmp_path / "out", **OPTIONS, encoder_learning_rate=rate, seed=1)
    again = train_head(body, text, tmp_path / "out", **OPTIONS, encoder_learning_rate=rate)
    assert again.losses.keys() == whole.losses.keys()
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_training_killed_before_its_last_step_was_written(body, text, tmp_path, monkeypatch):
    whole = train_head(body, text, tmp_path / "whole", **OPTIONS)

    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(head_training, "atomic_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            train_head(body, text, tmp_path / "out", **OPTIONS)
    assert train_head(body, text, tmp_path / "out", **OPTIONS).losses.keys() == whole.losses.keys()
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_training_that_diverges_is_an_error(body, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        HeadTrainer,
        "loss_parts",
        lambda self, model, *batch: {"named": model.get_output_embeddings().bias.sum() * torch.nan},
    )
    monkeypatch.setitem(head_trainer.WEIGHTS, "bag", 0.0)
    with pytest.raises(AnyspladeError, match="the training diverged"):
        train_head(body, text, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_finished_head_is_not_trained_again(body, text, tmp_path):
    first = train_head(body, text, tmp_path / "out", **OPTIONS)
    written = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert train_head(body, text, str(tmp_path / "out"), **OPTIONS) == first
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(OutputError, match=r"other options \(layer_decay 0.7, now 0.5; seed 0, now 1\); choose another `output`"):
        train_head(body, text, tmp_path / "out", **OPTIONS, seed=1, layer_decay=0.5)
    with open(text, "a") as file:
        file.write("kabel\n")
    with pytest.raises(OutputError, match="another text, or by another version; choose another `output`"):
        train_head(body, text, tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize("name, content", [("model.safetensors", b"half"), ("tokenizer.json", None), ("head.json", b'{"model"')])
def test_a_damaged_head_is_named(name, content, body, text, tmp_path):
    train_head(body, text, tmp_path / "out", **OPTIONS | {"steps": 1})
    (tmp_path / "out" / name).unlink()
    if content:
        (tmp_path / "out" / name).write_bytes(content)
    message = f"{name} is missing or damaged; remove the folder" if name != "head.json" else "head.json is missing or damaged"
    with pytest.raises(OutputError, match=message):
        train_head(body, text, tmp_path / "out", **OPTIONS | {"steps": 1})
    shutil.rmtree(tmp_path / "out")
    assert train_head(body, text, tmp_path / "out", **OPTIONS | {"steps": 1}).precision in ("float32", "bfloat16")


def test_a_head_goes_on_when_there_is_room_again_and_nobody_else_is_there(body, text, tmp_path):
    whole = train_head(body, text, tmp_path / "whole", **OPTIONS)
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size
    with pytest.raises(OutputError, match=r"cannot be written: .*; make room"), room_for(size - 1):
        train_head(body, text, tmp_path / "out", **OPTIONS)
    with only_process(tmp_path / "out.parts"), pytest.raises(OutputError, match="another process works there now"):
        train_head(body, text, tmp_path / "out", **OPTIONS)
    (tmp_path / "out.parts" / "about.json").write_text("{")  # nobody knows what its checkpoints are of
    assert train_head(body, text, tmp_path / "out", **OPTIONS).losses == whole.losses
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_checkpoints_of_a_finished_head_are_removed(body, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(head_training.shutil, "rmtree", lambda *args, **kwargs: None)
        first = train_head(Path(body), Path(text), tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out.parts" / "checkpoint-8").exists()
    assert train_head(body, text, tmp_path / "out", **OPTIONS) == first
    assert not (tmp_path / "out.parts").exists()


def test_more_tokens_than_positions_are_refused(body, text, tmp_path):
    with pytest.raises(OptionError, match=r"has positions for 64 tokens, and `max_length` is 65; give at most 64"):
        train_head(body, text, tmp_path / "head", **OPTIONS | {"max_length": 65})
    assert not list(tmp_path.glob("head*"))


def test_several_processes_are_refused(body, text, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="without torchrun"):
        train_head(body, text, tmp_path / "out", **OPTIONS)


def test_a_classifier_gives_its_encoder(body, text, tmp_path):
    BertForSequenceClassification.from_pretrained(body).save_pretrained(tmp_path / "classifier")
    make_tokenizer().save_pretrained(tmp_path / "classifier")
    train_head(tmp_path / "classifier", text, tmp_path / "out", **OPTIONS)
    train_head(body, text, tmp_path / "same", **OPTIONS)
    expected, found = weights(tmp_path / "same"), weights(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected if name.startswith("bert."))


def test_a_foreign_folder_is_refused(body, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        train_head(body, text, tmp_path / "out", **OPTIONS)


ROOT = {"roberta": "roberta.", "mpnet": "mpnet.", "modernbert": "model.", "distilbert": "distilbert.", "deberta-v2": "deberta."}


@pytest.mark.parametrize("architecture", ROOT)
def test_architectures(architecture, text, tmp_path):
    body = make_body(architecture, tmp_path / "body")
    model, _ = with_new_head(body)
    square = [name for name, weight in model.named_parameters() if torch.equal(weight, torch.eye(32))]
    assert len(square) == 1
    rates = layer_rates(model, 1e-3, 0.5)
    assert rates.keys() == {name for name, _ in model.named_parameters() if name.startswith(ROOT[architecture])}
    for name, rate in rates.items():
        layer = next((layer for layer in (0, 1) if f".{layer}." in name), -1)
        assert rate == 1e-3 * 0.5 ** (1 - layer), name
    train_head(body, text, tmp_path / "out", **OPTIONS)
    after = weights(tmp_path / "out")
    kept = {name for name, weight in model.state_dict().items() if torch.equal(weight, after[name])}
    assert rates.keys() <= kept
    assert square[0] not in kept
    decoder = find_head(AutoModelForMaskedLM.from_pretrained(tmp_path / "out"))
    assert all(not torch.equal(bias, find_head(model).bias) for bias in decoder.biases)
    load_encoder(tmp_path / "out", k="auto")


def test_a_padded_embedding_table(text, tmp_path):
    body = make_body("bert", tmp_path / "body")
    small_model("bert", vocab_size=len(SPECIAL + WORDS) + 11).base_model.save_pretrained(body)
    train_head(body, text, tmp_path / "out", **OPTIONS)
    assert inspect_head(tmp_path / "out").vocabulary == len(SPECIAL + WORDS) + 11


def test_what_can_be_given_no_head(body, backbone, text, tmp_path):
    tokenizer = make_tokenizer()
    GPT2Model(GPT2Config(vocab_size=149, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    T5EncoderModel(T5Config(vocab_size=149, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "t5"
    )
    small_model("bert", vocab_size=120).base_model.save_pretrained(tmp_path / "small")
    small_model("esm", vocab_size=149).base_model.save_pretrained(tmp_path / "esm")
    small_model("luke", vocab_size=149).base_model.save_pretrained(tmp_path / "luke")
    for name in ("gpt2", "t5", "small", "esm", "luke"):
        tokenizer.save_pretrained(tmp_path / name)
    shutil.copytree(body, tmp_path / "unmasked")
    config = json.loads((tmp_path / "unmasked" / "tokenizer_config.json").read_text())
    (tmp_path / "unmasked" / "tokenizer_config.json").write_text(json.dumps(config | {"mask_token": None}))
    SentenceTransformer(modules=[StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=8)]).save_pretrained(
        str(tmp_path / "static")
    )
    for name, message in {
        str(tmp_path / "gpt2"): "'gpt2' is a decoder, which reads from left to right",
        str(tmp_path / "t5"): "'t5' is no masked LM",
        str(tmp_path / "small"): "149 tokens and the model 120",
        str(tmp_path / "esm"): "EsmForMaskedLM adds a bias outside its decoder",
        str(tmp_path / "luke"): "does not tie its decoder",
        str(tmp_path / "unmasked"): "its tokenizer has no mask token",
        str(tmp_path / "static"): "with 0 transformers in it",
        str(tmp_path / "nowhere"): "no such model folder",
        backbone: "has an MLM head already",
    }.items():
        with pytest.raises(ModelError, match=message) as refused:
            train_head(name, text, tmp_path / "out", **OPTIONS)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_every_form_of_text(collection_folder, tmp_path):
    texts = [json.loads(line)["text"] for line in (collection_folder / "corpus.jsonl").read_text().splitlines()]
    (tmp_path / "plain.txt").write_text("\n\n".join(texts))
    with gzip.open(tmp_path / "packed.txt.gz", "wt") as file:
        file.write("\n".join(texts) + "\n   \n")
    sources = (collection_folder, collection_folder / "corpus.jsonl", tmp_path / "plain.txt", tmp_path / "packed.txt.gz")
    samples = [sample_pieces(str(source), 100, 1000, 0) for source in sources]
    assert samples == [samples[0]] * 4
    assert sorted(samples[0]) == sorted(texts) != samples[0]


@pytest.mark.parametrize(
    "name, content", [("empty.txt", ""), ("blank.txt", "  \n\n"), ("empty.jsonl", '{"_id": "d", "text": ""}\n')]
)
def test_no_text(name, content, body, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="no text in it"):
        train_head(body, str(tmp_path / name), tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_few_texts_are_read_again(body, tmp_path):
    (tmp_path / "one.txt").write_text("kabel lodan\nmifil\nnot one word of the vocabulary\n")
    result = train_head(body, str(tmp_path / "one.txt"), tmp_path / "out", **OPTIONS)
    assert result.texts == 3
    assert result.losses["bag"][1] < result.losses["bag"][0]


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"max_length": 7},
        {"checkpoint_steps": 0},
        {"learning_rate": 0},
        {"layer_decay": 2},
        {"learning_rate": float("nan")},
    ],
)
def test_impossible_options(options, body, text, tmp_path):
    with pytest.raises(OptionError, match=next(iter(options))):
        train_head(body, text, tmp_path / "out", **options)


@given(st.text(st.sampled_from("ab \n\t"), max_size=300), st.integers(8, 40))
@example("a" * 100, 8)
@example("aaaaaaaa bbbbbbbb", 8)
def test_pieces_are_the_text(text, characters):
    pieces = list(head_training._pieces(text, characters))
    assert all(0 < len(piece) <= characters and piece == piece.strip() for piece in pieces)
    assert "".join(pieces).replace(" ", "") == "".join(text.split())
    if all(len(word) <= characters // 2 for word in text.split()):
        assert " ".join(pieces).split() == text.split()


def test_a_sample_is_drawn_from_all_of_a_text(tmp_path):
    (tmp_path / "many.txt").write_text("".join(f"{i}\n" for i in range(1000)))
    samples = [sample_pieces(str(tmp_path / "many.txt"), 100, 50, seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert len(set(samples[0])) == 100
    assert 350 < sum(map(int, samples[0])) / 100 < 650


def test_the_command_line(body, dense, text, tmp_path, capfd):
    for encoder, message in ((dense, "it has no MLM head; `anysplade head "), (body, "with no trained MLM head")):
        assert main(["inspect", encoder]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        [line] = err.splitlines()
        assert message in line
        assert "BertModel, 2 layers, vocabulary 149" in line
        assert "--text CORPUS --out BACKBONE` gives it one" in line
    command = [
        "head",
        dense,
        "--text",
        text,
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "4",
        "--batch-size",
        "4",
        "--max-length",
        "16",
    ]
    assert main([*command, "--json"]) == 0
    out, _ = capfd.readouterr()
    assert json.loads(out)["model"] == str(tmp_path / "out")
    assert main(command) == 0
    out, _ = capfd.readouterr()
    assert "loss: named" in out
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert main([*command, "--seed", "1"]) == 2
