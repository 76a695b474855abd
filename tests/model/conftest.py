import pytest
import torch

from architectures import VOCABULARY


@pytest.fixture(scope="module")
def ids():
    return torch.randint(5, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
