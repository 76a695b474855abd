import pytest
import torch

from anysplade.model.fused import pad


@pytest.mark.parametrize("lengths", [[3], [2, 5, 1], [1, 1, 4, 4]])
def test_texts_one_after_another_are_padded(lengths):
    tokens = torch.randn(sum(lengths), 4, requires_grad=True)
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    padded, mask = pad(tokens, starts, max(lengths))
    assert torch.equal(padded, torch.nn.utils.rnn.pad_sequence(tokens.split(lengths), batch_first=True))
    assert mask.sum(1).tolist() == lengths
    assert torch.equal(padded[mask], tokens)
    upstream = torch.randn(padded.shape)
    padded.backward(upstream)
    assert torch.equal(tokens.grad, upstream[mask])
