import pytest
import torch
from transformers import AutoModelForMaskedLM

from anysplade.errors import ModelError, OptionError
from anysplade.model.head import find_head
from anysplade.study import edits
from anysplade.study.edits import edited
from tiny import make_backbone

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
