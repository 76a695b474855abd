import json
import shlex
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM

from anysplade import evaluate, train
from anysplade._common.hashing import DataHash
from anysplade.cli import app, main
from anysplade.data.pairs import load_pairs
from anysplade.model.head import find_head
from anysplade.study import cells, inputs
from anysplade.study.cells import commands, read_cell, run_cell
from anysplade.study.plan import Cell
from anysplade.training.config import TrainingConfig
from tiny import make_backbone, make_collection
from vocabularies import byte_level, make_cased

OPTIONS = {"steps": 3, "batch_size": 4, "max_length": 16, "learning_rate": 1e-3, "k": 2.0, "shift": 0.0, "seed": 0}


def test_a_cell_is_run_once_and_its_commands_make_it_again(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    odd = {"k": 1.0, "fused": False, "max_length": None, "texts": None, "query_prompt": "- it's $HOME: ", "report_to": ()}
    cell = Cell("backbone", "collection", OPTIONS | odd, edits=(("folded", 2.0),), level=0.05, spread_of=2.0)
    collections = ("collection",)
    assert read_cell(place, cell, collections) is None
    run_cell(cell, collections, place)
    record = read_cell(place, cell, collections)
    assert record.shift != 0
    assert record.temperature > 1
    assert record.after.positive_share == pytest.approx(0.05, abs=0.005)
    assert len(record.results["collection"].per_query) == record.results["collection"].queries == 20
    path = cells.cell_file(place, cell)
    kept = json.loads(path.read_text())
    assert kept["results"]["collection"]["nDCG@10"] == record.results["collection"].ndcg
    assert kept["cell"]["edits"] == [["folded", 2.0]]
    assert kept["after"]["mean_row_norm"] == record.after.mean_row_norm
    assert not list((place / "runs").iterdir())
    written = path.read_bytes()
    run_cell(cell, collections, place)
    assert path.read_bytes() == written
    assert read_cell(place, cell, ("collection", "another")) is None

    make, train = record.commands
    exec(shlex.split(make)[2])
    assert main(shlex.split(train)[1:]) == 0
    again = evaluate("run/model", "collection", ["nDCG@10"], depth=100)
    assert again.metrics["nDCG@10"] == record.results["collection"].ndcg
    assert json.loads((place / "run" / "run.json").read_text())["calibration"]["shift"] == record.shift


WORD = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NUMBER = st.floats(1e-6, 1e6)
OPTION = {
    "texts": st.none() | WORD,
    "negatives": st.none() | st.integers(0, 9),
    "objective": st.sampled_from(["contrastive", "kl + 0.05*margin-mse", "kl+1e-3*contrastive"]),
    "temperature": NUMBER,
    "teacher_temperature": st.none() | NUMBER,
    "k": st.just("auto") | NUMBER,
    "shift": st.just("auto") | st.floats(-1e6, 1e6),
    "bias": st.sampled_from(["scale", "keep"]),
    "double_log": st.booleans(),
    "query_prompt": WORD,
    "document_prompt": WORD,
    "steps": st.none() | st.integers(1, 10**6),
    "epochs": NUMBER,
    "head_learning_rate": st.none() | NUMBER,
    "query_regularizer_weight": NUMBER,
    "regularizer": st.sampled_from(["flops", "df-flops", "l1"]),
    "max_length": st.none() | st.integers(1, 512),
    "seed": st.integers(0, 10**6),
    "dev": st.none() | WORD,
    "gradient_checkpointing": st.booleans(),
    "attention": st.none() | WORD,
    "report_to": st.lists(WORD, max_size=3).map(tuple),
    "fused": st.booleans(),
}


@settings(max_examples=150, deadline=None)
@given(options=st.fixed_dictionaries({}, optional=OPTION), data=WORD.filter(lambda text: text and not text.startswith("-")))
def test_the_command_of_any_options_is_read_as_the_same_options(options, data):
    (command,) = commands(Cell("a backbone", data, options), options)
    program, *tokens = shlex.split(command)
    _, bound, *_ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    assert program == "anysplade"
    assert asdict(bound.arguments["options"]) == asdict(TrainingConfig("a backbone", data, output="run", **options))


def test_every_option_has_a_command_that_is_tested():
    apart = {"backbone", "data", "_", "output"}
    kinds = {name: field.type for name, field in TrainingConfig.__dataclass_fields__.items() if name not in apart}
    tested = {kinds[name] for name in OPTION}
    assert {name for name, kind in kinds.items() if kind not in tested} <= {
        "fold",
        "pooling",
        "query_encoder",
        "on_collapse",
        "precision",
    }


def test_the_command_of_an_edited_backbone_is_quoted(place, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    backbone = make_backbone("bert", tmp_path / 'it\'s "$HOME"')
    make, _ = commands(Cell(backbone, "pairs", {}, edits=(("folded", 2.0),)), {})
    exec(shlex.split(make)[2])
    assert (tmp_path / capsys.readouterr().out.strip() / "config.json").exists()


def test_a_cell_is_not_read_for_a_collection_that_changed(place, tmp_path):
    collection = make_collection(tmp_path / "collection")
    cell = Cell(str(place / "backbone"), str(place / "collection"), OPTIONS)
    run_cell(cell, (str(collection),), tmp_path)
    assert read_cell(tmp_path, cell, (str(collection),)).hash == cell.hash
    with open(collection / "corpus.jsonl", "a") as file:
        file.write('{"_id": "new", "text": "kabel"}\n')
    inputs.clear_caches()
    assert read_cell(tmp_path, cell, (str(collection),)) is None


def written(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("content", [b"", b'{"hash": ', b"\xff", b"[]"])
def test_a_damaged_record_is_no_record(content, tmp_path, caplog):
    (tmp_path / "cell.json").write_bytes(content)
    assert cells.read_record(tmp_path / "cell.json") is None
    assert "cell.json: is damaged, or of an older version; the cell is run again" in caplog.text


def test_a_cell_reads_texts_and_negatives(place, tmp_path):
    texts = str(place / "collection")
    rows = [{"query_id": f"q{i}", "positive_id": f"d{i}", "negative_ids": [f"d{i + 1}", f"d{i + 2}"]} for i in range(8)]
    cell = Cell(str(place / "backbone"), written(tmp_path / "ids.jsonl", rows), OPTIONS | {"texts": texts, "negatives": 1})
    run_cell(cell, (texts,), tmp_path)
    record = read_cell(tmp_path, cell, (texts,))
    assert record.data_hash == DataHash(load_pairs(cell.data, texts=texts, negatives=1)).hexdigest()
    assert f"--texts={texts}" in record.commands[0]
    assert "--negatives=1" in record.commands[0]


def test_the_start_of_a_cell_is_that_of_its_training(tmp_path, monkeypatch):
    """Folded, and with prompts: what the record says of the head is what the training measured."""
    backbone = make_cased("modernbert", tmp_path / "cased", byte_level())
    words = ["Python going", "python (the) ING", "the going in", "Go 11 npy"]
    data = written(tmp_path / "pairs.jsonl", [{"query": one, "positive": f"{one} {other}"} for one in words for other in words])
    collection = str(make_collection(tmp_path / "collection"))
    options = OPTIONS | {"k": "auto", "shift": "auto", "fold": "case", "query_prompt": "in: ", "document_prompt": "going "}
    trained = []
    monkeypatch.setattr(cells, "train", lambda config: trained.append(train(config)) or trained[0])
    cell = Cell(backbone, data, options)
    run_cell(cell, (collection,), tmp_path)
    record = read_cell(tmp_path, cell, (collection,))
    for name in ("before", "after"):
        measured = trained[0].calibration[name]
        for statistic in ("positive_share", "query_active_dims", "document_active_dims", "score_std", "start_loss"):
            assert getattr(getattr(record, name), statistic) == pytest.approx(measured[statistic], rel=1e-5), statistic


def test_a_learning_rate_for_the_head_alone(place, tmp_path, capsys):
    options = [
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--max-length",
        "16",
        "--learning-rate",
        "1e-12",
        "--head-learning-rate",
        "0.01",
    ]
    arguments = ["train", str(place / "backbone"), str(place / "collection"), *options, "--warmup-ratio", "0"]
    assert main([*arguments, "--k", "2", "--shift", "0", "--out", str(tmp_path / "run")]) == 0
    before, after = (AutoModelForMaskedLM.from_pretrained(folder) for folder in (place / "backbone", tmp_path / "run" / "model"))
    assert not torch.allclose(find_head(after).decoder.weight, find_head(before).decoder.weight / 2, atol=1e-4)
    torch.testing.assert_close(after.get_input_embeddings().weight, before.get_input_embeddings().weight)
    capsys.readouterr()
    assert main([*arguments, "--k", "1", "--shift", "0", "--out", str(tmp_path / "tied")]) == 2
    assert "tied to the input embeddings" in capsys.readouterr().err
