import copy
import json
import shlex
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM

from anysplade import evaluate, train
from anysplade._common.hashing import DataHash
from anysplade.cli import app, main
from anysplade.data.pairs import load_pairs
from anysplade.errors import ModelError, OptionError
from anysplade.model.head import find_head
from anysplade.study import cells, edits, inputs
from anysplade.study.cells import commands, read_cell, run_cell
from anysplade.study.edits import edited
from anysplade.study.plan import Cell
from anysplade.training.config import TrainingConfig
from tiny import make_backbone, make_collection
from vocabularies import byte_level, make_cased

IDS = torch.arange(5, 29).reshape(2, 12)


def logits(folder):
    with torch.no_grad():
        return AutoModelForMaskedLM.from_pretrained(folder).eval()(input_ids=IDS).logits


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "roberta", "distilbert"])
def test_edits(architecture, tmp_path):
    backbone = make_backbone(architecture, tmp_path / "backbone")
    raw = logits(backbone)

    def head_of(*edits):
        folder = edited(backbone, edits, tmp_path / "edited")
        model = AutoModelForMaskedLM.from_pretrained(folder)
        return logits(folder), find_head(model).decoder.weight, model.get_input_embeddings().weight

    original = find_head(AutoModelForMaskedLM.from_pretrained(backbone)).decoder.weight
    output, weight, embeddings = head_of(("untied", 1.0))
    assert torch.equal(output, raw)
    assert weight is not embeddings

    output, weight, embeddings = head_of(("scaled", 4.0))
    torch.testing.assert_close(output, raw / 4)
    torch.testing.assert_close(embeddings, original)

    output, weight, embeddings = head_of(("folded", 4.0))
    torch.testing.assert_close(output, raw / 4)
    assert weight is embeddings
    torch.testing.assert_close(weight, original)

    _, weight, embeddings = head_of(("tied", 4.0))
    assert weight is embeddings
    torch.testing.assert_close(weight, original / 4)

    output, weight, _ = head_of(("scaled", 4.0), ("folded", 0.25))  # the raw function with a quarter of the norm
    torch.testing.assert_close(output, raw)
    torch.testing.assert_close(weight, original / 4)


def test_edits_are_written_once_and_refused_where_impossible(tmp_path, monkeypatch):
    backbone = make_backbone("bert", tmp_path / "backbone")
    assert edited(backbone, (), tmp_path) == backbone
    folder = edited(backbone, (("folded", 2.0),), tmp_path / "edited")
    monkeypatch.setattr(edits, "_edit", None)  # editing again would need it
    assert edited(backbone, (("folded", 2.0),), tmp_path / "edited") == folder
    monkeypatch.undo()
    with pytest.raises(OptionError, match="'bent' is not an edit"):
        edited(backbone, (("bent", 2.0),), tmp_path / "edited")
    model = AutoModelForMaskedLM.from_pretrained(backbone)
    model.cls.predictions.transform.LayerNorm = torch.nn.Identity()
    with pytest.raises(ModelError, match="no LayerNorm before the decoder"):
        edits._edit(model, "folded", 2.0)


def test_a_runtime_scalar_is_a_learning_rate(tmp_path):
    """W with 1/k behind it, under Adam, goes where W/k goes at a kth of the learning rate."""
    torch.manual_seed(0)
    k, rate = 8.0, 1e-2
    hidden, goal = torch.randn(16, 6), torch.randn(16, 9)
    scaled_at_run_time = torch.nn.Linear(6, 9)
    folded = copy.deepcopy(scaled_at_run_time)
    with torch.no_grad():
        for tensor in folded.parameters():
            tensor /= k
    optimizers = [
        torch.optim.AdamW(scaled_at_run_time.parameters(), lr=rate, eps=1e-12, weight_decay=0),
        torch.optim.AdamW(folded.parameters(), lr=rate / k, eps=1e-12, weight_decay=0),
    ]
    for _ in range(20):
        outputs = scaled_at_run_time(hidden) / k, folded(hidden)
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            (output - goal).square().mean().backward()
            optimizer.step()


OPTIONS = {"steps": 3, "batch_size": 4, "max_length": 16, "learning_rate": 1e-3, "k": 2.0, "shift": 0.0, "seed": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    make_backbone("bert", folder / "backbone")
    make_collection(folder / "collection")
    return folder


def test_what_makes_a_cell(place):
    base = Cell(str(place / "backbone"), str(place / "collection"), OPTIONS)
    turned = dict(reversed(OPTIONS.items()))
    assert Cell(base.backbone, base.data, turned).hash == base.hash
    other = make_backbone("modernbert", place / "other")
    others = [
        Cell(other, base.data, OPTIONS),
        Cell(base.backbone, base.data, OPTIONS | {"seed": 1}),
        Cell(base.backbone, base.data, OPTIONS, edits=(("folded", 2.0),)),
        Cell(base.backbone, base.data, OPTIONS, level=0.01),
    ]
    assert len({base.hash, *(cell.hash for cell in others)}) == 5


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


def test_the_hash_covers_the_scores_of_a_teacher(place, tmp_path):
    pair = {"query": "a", "positive": "b", "negatives": ["c"]}
    hashes = set()
    for i, scores in enumerate(({}, {"scores": [2.0, 1.0]}, {"scores": [3.0, 1.0]})):
        data = written(tmp_path / f"{i}.jsonl", [pair | scores])
        hashes.add(Cell(str(place / "backbone"), data, OPTIONS).hash)
    assert len(hashes) == 3


@pytest.fixture
def named(place, tmp_path):
    """Options whose content lies in other files: the texts of ids, a teacher, a dev collection."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    make_collection(tmp_path / "dev")
    written(tmp_path / "texts" / "corpus.jsonl", [{"_id": f"d{i}", "text": f"document {i}"} for i in range(4)])
    written(tmp_path / "texts" / "queries.jsonl", [{"_id": "q", "text": "query"}])
    data = written(tmp_path / "ids.jsonl", [{"query_id": "q", "positive_id": "d0", "negative_ids": ["d1", "d2"]}])
    options = {"texts": str(tmp_path / "texts"), "negatives": 1, "teacher": str(tmp_path / "teacher")}
    options |= {"dev": str(tmp_path / "dev"), "dev_split": "test"}
    return Cell(str(place / "backbone"), data, OPTIONS | options)


def hash_of(cell, **changes):
    inputs.clear_caches()
    return replace(cell, options=cell.options | changes).hash


@pytest.mark.parametrize(
    "file, before, after",
    [
        ("teacher/config.json", "{}", "{ }"),
        ("dev/qrels/test.tsv", "q0\td0\t1", "q0\td0\t2"),
        ("dev/queries.jsonl", '"q0"', '"q0", "text2": ""'),
        ("texts/corpus.jsonl", "document 0", "another document"),
        ("texts/corpus.jsonl", "document 1", "another document"),
        ("texts/queries.jsonl", "query", "question"),
        ("ids.jsonl", '"d1", "d2"', '"d2", "d1"'),
    ],
)
def test_the_hash_covers_the_content_of_what_options_name(file, before, after, named, tmp_path):
    known = hash_of(named)
    text = (tmp_path / file).read_text()
    assert before in text
    (tmp_path / file).write_text(text.replace(before, after))
    assert (hash_of(named) == known) == (file == "dev/queries.jsonl")  # a column that is not read changes nothing
    assert hash_of(named) != hash_of(named, seed=1)


def test_the_hash_covers_nothing_else(named, tmp_path):
    """Neither places nor trackers, nor a default that is given, nor negatives and documents that are not used."""
    known = hash_of(named)
    for name in ("teacher", "dev", "texts"):
        assert hash_of(named, **{name: str(shutil.copytree(tmp_path / name, tmp_path / f"other-{name}"))}) == known
    assert hash_of(named, report_to=("tensorboard",), warmup_ratio=TrainingConfig.warmup_ratio) == known
    corpus = tmp_path / "texts" / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("document 2", "another document").replace("document 3", "another"))
    assert hash_of(named) == known
    assert len({known, hash_of(named, negatives=2), hash_of(named, negatives=0)}) == 3


def test_a_default_or_a_rule_that_changes_makes_another_cell(place, monkeypatch):
    cell = Cell(str(place / "backbone"), str(place / "collection"), OPTIONS)
    bare = replace(cell, options={name: value for name, value in OPTIONS.items() if name not in ("k", "shift")})  # auto
    known = cell.hash, bare.hash
    monkeypatch.setattr("anysplade.study.plan.ACTIVE_SHARE", 0.5)
    assert (cell.hash == known[0], bare.hash == known[1]) == (True, False)
    assert hash_of(cell, on_collapse="recalibrate") not in known
    monkeypatch.undo()
    assert (cell.hash, bare.hash) == known
    monkeypatch.setitem(TrainingConfig.__init__.__kwdefaults__, "warmup_ratio", 0.2)
    assert not {cell.hash, bare.hash} & {*known}


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
