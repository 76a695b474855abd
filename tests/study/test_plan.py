import pytest

from anysplade.errors import OptionError
from anysplade.study.plan import STUDIES, StudyConfig, plan
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
