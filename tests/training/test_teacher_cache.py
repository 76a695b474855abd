import numpy as np
import pytest

from anysplade.training.teacher_cache import VectorCache, _hash
from anysplade.training.teacher_keys import SortedKeys
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


def test_many_shards_are_found_through_one_sorted_file(teachers, tmp_path, monkeypatch):
    """With the caches of earlier versions, which have no such file, two writers at once, and a shard that is lost."""
    monkeypatch.setattr("anysplade.training.teacher_cache.SHARD", 3)
    teacher, texts = open_teacher(teachers["dense"]), [document for _, document in PAIRS]
    VectorCache(teacher, tmp_path).vectors(texts[:9], "document")
    folder = tmp_path / teacher.key
    assert not list(folder.glob("sorted-keys*"))
    monkeypatch.setattr("anysplade.training.teacher_cache._RECENT", 1)
    monkeypatch.setattr("anysplade.training.teacher_keys._BLOCK", 4)
    one, other = VectorCache(teacher, tmp_path), VectorCache(teacher, tmp_path)
    assert len(one._recent) == 0
    expected = [one.vectors(texts[:18], "document"), other.vectors(texts[9:], "document")]
    counted = []
    encode = type(teacher).encode
    monkeypatch.setattr(
        type(teacher), "encode", lambda *given, **named: (counted.append(len(given[1])), encode(*given, **named))[1]
    )
    both = VectorCache(teacher, tmp_path)
    np.testing.assert_array_equal(both.vectors(texts[:18], "document")[:9], expected[0][:9])
    np.testing.assert_allclose(both.vectors(texts[9:], "document").astype(float), expected[1].astype(float), atol=1e-3)
    assert len(list(folder.glob("sorted-keys*"))) == 1
    assert counted == []
    lost = folder / f"{both._find([_hash('document', texts[0])])[0][0]}.npy"
    lost.write_bytes(lost.read_bytes()[:-2])
    np.testing.assert_array_equal(VectorCache(teacher, tmp_path).vectors(texts[:18], "document")[:9], expected[0][:9])
    assert counted == [3]


def test_keys_with_an_equal_half(tmp_path):
    keys = np.zeros((6, 16), np.uint8)
    keys[:, 8] = [1, 2, 3, 4, 5, 6]
    keys[3:, 0] = 7
    found = SortedKeys(tmp_path)
    for i in range(3):
        found.add({f"shard{i}": (keys[[i, 5 - i]], 1)})
    wanted = [key.tobytes() for key in keys]
    assert SortedKeys(tmp_path).find([*wanted, bytes(16)]) == [
        *(("shard0", 0), ("shard1", 0), ("shard2", 0), ("shard2", 1), ("shard1", 1), ("shard0", 1)),
        None,
    ]
