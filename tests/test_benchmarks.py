"""The check for a machine with a GPU runs to its end, with sizes for a CPU."""

import importlib
import json
import sys
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("ignore")
def test_the_check_of_a_gpu_measures_every_part(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--device", "cpu", "--rounds", "1", "--out", str(out)])
    importlib.import_module("gpu").main()
    result = json.loads(out.read_text())
    for part in ("correctness", "head", "step", "encoding"):
        assert result[part], part
    exact = {name: errors for name, errors in result["correctness"].items() if "float32" in name}
    assert exact
    assert all(max(errors[:-1]) < 1e-4 and errors[-1] for errors in exact.values())
    assert "encoding, bert-tiny" in capsys.readouterr().err
