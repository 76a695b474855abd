import json
import os
import subprocess
import sys

COMMANDS = """
import json, sys
from anysplade.cli import main
for command in json.loads(sys.argv[1]):
    print(main(command), flush=True)
    print("end", file=sys.stderr, flush=True)
"""


def test_a_home_that_cannot_be_written(backbone, collection_folder, tmp_path):
    """All that needs no cache works; what needs one names the variable that moves it, in one line."""
    (tmp_path / "file").touch()
    no_folder = str(tmp_path / "file" / "x")  # for root too, whom permissions do not stop
    names = ("ANYSPLADE_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "IR_DATASETS_HOME", "MPLCONFIGDIR")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    index = str(tmp_path / "index")
    works = [
        ["inspect", backbone],
        ["train", backbone, str(collection_folder), "--out", str(tmp_path / "run"), "--steps", "2", "--batch-size", "4"],
        ["evaluate", str(tmp_path / "run"), "bm25", str(collection_folder), "--json"],
        ["index", str(tmp_path / "run"), str(collection_folder), "--out", index],
        ["search", index, "kabel"],
    ]
    refused = {
        "IR_DATASETS_HOME": ["evaluate", "bm25", "beir/scifact"],
        "HF_HOME": ["inspect", "no-such/model"],
        "ANYSPLADE_CACHE": ["index", backbone, str(collection_folder), "--to", "qdrant://localhost:1/x"],
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps([*works, *refused.values()])],
        env=environment | {"HOME": no_folder, "XDG_CACHE_HOME": no_folder},
        capture_output=True,
        text=True,
        timeout=300,
    )
    codes = [line for line in done.stdout.splitlines() if line.isdecimal()]
    assert codes == ["0"] * len(works) + ["2"] * len(refused), done.stderr
    said = done.stderr.split("end\n")
    assert said[2].count("vectors are not kept") == 1
    assert "set ANYSPLADE_CACHE to a folder that can be written" in said[2]
    for variable, err in zip(refused, said[len(works) :], strict=False):
        error = [line for line in err.splitlines() if line.startswith("anysplade: ")]
        assert len(error) == 1
        assert f"set {variable} to" in error[0]
