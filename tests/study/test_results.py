import json
from pathlib import Path

import pytest

from anysplade.errors import OutputError
from anysplade.study.conclusions import conclude
from anysplade.study.results import read_results

FILES = [Path(__file__).parents[2] / "results" / name / "study.json" for name in ("study", "study-squad")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_a_committed_result_is_read_and_written_as_it_is(file):
    written = json.loads(json.dumps(read_results(file).to_dict()))
    kept = json.loads(file.read_text())
    for study in kept["studies"].values():
        for row in study["rows"]:
            row.setdefault("failed", [])
    for baseline in kept["bm25"].values():
        baseline.setdefault("data_hash", None)
    assert written == kept


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_the_conclusions_of_a_committed_result_follow_from_its_numbers(file):
    result = read_results(file)
    for name, study in result.studies.items():
        if name != "dynamics":  # the curves are kept with four digits, so a mean of them may differ in its last one
            assert conclude(name, study, result.bm25) == study.conclusions


def test_a_result_of_an_older_version_is_refused(tmp_path):
    kept = json.loads(FILES[1].read_text())
    kept["studies"]["main"]["rows"][0].pop("key")
    (tmp_path / "study.json").write_text(json.dumps(kept))
    with pytest.raises(OutputError, match="older version; remove it"):
        read_results(tmp_path / "study.json")
