import numpy as np
import pytest

from anysplade.training.teacher_cache import VectorCache
from anysplade.training.teachers import open_teacher
from tiny import WORDS

PAIRS = [(" ".join(WORDS[i : i + 3]), " ".join(WORDS[i + 1 : i + 9])) for i in range(0, 96, 4)]  # query and document


@pytest.mark.parametrize("kind", ["dense", "sparse", "cross-encoder"])
def test_nothing_is_computed_twice(kind, teachers, tmp_path, monkeypatch):
    teacher = open_teacher(teachers[kind])
    pairs = list(PAIRS)
    before = VectorCache(teacher, tmp_path).scores(pairs)

    def fail(*_):
        raise AssertionError("computed again")

    again = VectorCache(teacher, tmp_path)
    for name in ("encode", "rate"):
        monkeypatch.setattr(type(teacher), name, fail)
    assert np.array_equal(again.scores(pairs[::-1]), before[::-1])
    monkeypatch.undo()
    for file in (tmp_path / teacher.key).iterdir():  # damaged: computed again
        file.write_bytes(file.read_bytes()[:90])
    np.testing.assert_array_equal(VectorCache(teacher, tmp_path).scores(pairs), before)
    for file in (tmp_path / teacher.key).iterdir():
        if ".keys" not in file.name:
            file.write_bytes(file.read_bytes()[:150])
    np.testing.assert_array_equal(VectorCache(teacher, tmp_path).scores(pairs), before)


def test_a_killed_run_goes_on_after_its_last_shard(teachers, tmp_path, monkeypatch):
    teacher, seen = open_teacher(teachers["dense"]), []
    monkeypatch.setattr("anysplade.training.teacher_cache.SHARD", 10)
    encode = type(teacher).encode

    def dies(self, texts, role, shown=None):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.extend([texts])
        return encode(self, texts, role, shown=shown)

    texts = [document for _, document in PAIRS]
    monkeypatch.setattr(type(teacher), "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        VectorCache(teacher, tmp_path).vectors(texts, "document")
    seen.clear()
    vectors = VectorCache(teacher, tmp_path).vectors(texts, "document")
    assert [len(part) for part in seen] == [len(texts) - 20]
    monkeypatch.undo()
    np.testing.assert_allclose(vectors.astype(np.float32), teacher.encode(texts, "document").astype(np.float32), atol=1e-3)
