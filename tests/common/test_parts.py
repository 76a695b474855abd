import numpy as np
import pytest
from scipy import sparse

from anysplade._common.parts import encode_in_parts, read_rows
from anysplade._common.progress import bar

ITEMS = list(range(10))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_parts_are_stored_and_a_damaged_one_is_made_again(suffix, tmp_path):
    encoded = []

    def encode(start, part):
        assert part == ITEMS[start : start + 4]
        encoded.append(start)
        rows = np.array(part, np.float32)[:, None] * np.ones(3, np.float32)
        return rows if suffix == ".npy" else sparse.csr_matrix(rows)

    def rows(folder):
        with bar("encoding", "text", len(ITEMS)) as shown:
            parts = list(encode_in_parts(ITEMS, 4, encode, folder, suffix, shown))
        return np.concatenate([part if suffix == ".npy" else part.toarray() for part in parts])

    expected = rows(None)
    np.testing.assert_array_equal(expected[:, 0], ITEMS)
    assert encoded == [0, 4, 8]
    np.testing.assert_array_equal(rows(tmp_path), expected)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"{start:012}{suffix}" for start in (0, 4, 8)]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:90])
    assert [read_rows(file) is None for file in files] == [True, True, False]
    encoded.clear()
    np.testing.assert_array_equal(rows(tmp_path), expected)
    assert encoded == [0, 4]
    encoded.clear()
    np.testing.assert_array_equal(rows(tmp_path), expected)
    assert not encoded
