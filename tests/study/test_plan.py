import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch

from anysplade.errors import OptionError
from anysplade.study import inputs
from anysplade.study.plan import STUDIES, Cell, StudyConfig, plan
from anysplade.training.config import TrainingConfig
from tiny import make_backbone, make_collection


def test_heads_are_matched_in_norm():
    config = StudyConfig("controls", output="out", backbones=("bert-tiny", "modernbert-tiny"), seeds=2)
    rows = plan("controls", config, {"bert-tiny": 1.0, "modernbert-tiny": 3.0})
    matched = {(row.backbone, row.arm): row for row in rows if row.arm.startswith("norm of")}
    assert list(matched) == [("bert-tiny", "norm of the highest backbone"), ("modernbert-tiny", "norm of the lowest backbone")]
    assert [row.cells[0].edits[0][1] for row in matched.values()] == pytest.approx([1 / 3, 3.0])
    assert all(len(row.cells) == 2 for row in rows)


def test_cells_are_shared_between_studies(tmp_path):
    backbones = (make_backbone("bert", tmp_path / "small-bert"), make_backbone("modernbert", tmp_path / "small-modernbert"))
    config = StudyConfig("all", output="out", backbones=backbones, data=str(make_collection(tmp_path / "collection")))
    rows = {name: plan(name, config, dict.fromkeys(config.backbones, 1.0)) for name in STUDIES}
    main_ones = {cell.hash for row in rows["main"] for cell in row.cells}
    for name in ("norm", "dynamics"):
        assert {cell.hash for row in rows[name] for cell in row.cells} <= main_ones
    base = {cell.hash for row in rows["tradeoff"] for cell in row.cells}
    assert len(base & main_ones) == 2 * 3 * config.seeds


def test_impossible_settings():
    for options, message in (
        ({"seeds": 0}, "seeds is 0"),
        ({"k": 1.0}, "must be above 1"),
        ({"backbones": ()}, "at least one backbone"),
        ({"backbones": ("a/bert", "b/bert")}, "two have the same name"),
        ({"training": {"steps": 0}}, "steps is 0"),
    ):
        with pytest.raises(OptionError, match=message):
            StudyConfig("norm", output="out", **options)


OPTIONS = {"steps": 3, "batch_size": 4, "max_length": 16, "learning_rate": 1e-3, "k": 2.0, "shift": 0.0, "seed": 0}


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


def written(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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
