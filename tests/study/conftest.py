import pytest

from tiny import make_backbone, make_collection


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    make_backbone("bert", folder / "backbone")
    make_collection(folder / "collection")
    return folder
