from anysplade.data.names import is_built_in


def test_a_name_of_its_own_beside_a_folder_of_that_name(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert is_built_in("bm25-x", "bm25-x", "y")
    assert not caplog.records
    (tmp_path / "bm25-x").mkdir()
    assert is_built_in("bm25-x", "bm25-x", "y")
    assert not is_built_in("./bm25-x", "bm25-x", "y")
    assert [record.getMessage() for record in caplog.records] == [
        "bm25-x: read as the built-in name, not as the file or folder here; write ./bm25-x for that"
    ]
