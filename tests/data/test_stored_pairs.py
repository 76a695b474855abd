from anysplade import Pair
from anysplade.data.stored_pairs import StoredPairs


def test_examples_on_disk_are_the_examples(tmp_path):
    pairs = [Pair(f"q{i}", f"p{i}", (f"n{i}", f"m{i}"), (2.0, 1.0, i + 0.5)) for i in range(3000)]
    stored = StoredPairs.write(iter(pairs), tmp_path / "a::[b]" / "data")
    assert list(stored) == pairs
    assert stored[5:8] == pairs[5:8]
    assert stored.dataset.column_names == ["query", "positive", "negative_1", "negative_2", "label"]
    assert StoredPairs(tmp_path / "a::[b]" / "data").data_hash == stored.data_hash
    assert StoredPairs.write(iter(pairs[:-1]), tmp_path / "other").data_hash != stored.data_hash
