"""Own words in training: what the monitor sees, the loss and its gradients, and what a training with it keeps."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import sparse

from anysplade import OptionError, TrainingConfig, train
from anysplade.model.own_words import own_words
from anysplade.training.own_words import BatchPieces, OwnWordsLoss
from tiny import WORDS, make_lexical

WEIGHTS = {"query": torch.tensor([0.0, 1.0, 2.0, 4.0]), "document": torch.tensor([0.0, 3.0, 1.0, 5.0])}
IDS = [torch.tensor([[1, 2, 2], [3, 0, 0]]), torch.tensor([[1, 3, 9], [2, 0, 0]]), torch.tensor([[2, 0, 0], [3, 1, 0]])]


def flat(ids):
    """Tokens as one row without padding, as flash attention takes them."""
    lengths = (ids > 0).sum(dim=1)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return {"input_ids": ids[ids > 0][None], "cu_seq_lens_q": ends}


@pytest.fixture(params=["padded", "flat"])
def pieces(request):
    found = BatchPieces(dict(WEIGHTS))
    found.read(None, ([{"input_ids": ids} if request.param == "padded" else flat(ids) for ids in IDS],))
    return found


def columns(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(2, 4, generator=generator, dtype=torch.float64) - 0.4).relu().float().requires_grad_() for _ in IDS]


def test_the_monitor_sees_own_words_kept(pieces):
    vectors = columns()
    documents = torch.cat(vectors[1:]).detach().numpy()
    ids = torch.cat(IDS[1:]).tolist()
    expected = [
        own_words(sparse.csr_matrix(vectors[0].detach().numpy()), IDS[0].tolist(), WEIGHTS["query"].numpy()),
        own_words(sparse.csr_matrix(documents), ids, WEIGHTS["document"].numpy()),
    ]
    assert pieces.kept(vectors).tolist() == pytest.approx(expected)
    del pieces.weights["query"]  # queries that are their tokens
    assert math.isnan(pieces.kept(vectors)[0])


def test_the_loss_and_its_gradients_are_those_of_the_formula(pieces):
    class Nothing(torch.nn.Module):
        def compute_loss_from_embeddings(self, embeddings, labels):
            return embeddings[0].new_zeros(())

    ours, plain = columns(), columns()
    loss = OwnWordsLoss(Nothing(), pieces, 0.5).compute_loss_from_embeddings(ours)
    assert loss.keys() == {"base_loss", "own_words_regularizer_loss"}
    expected = 0
    for role, texts in (("query", [0]), ("document", [1, 2])):
        own = [(column, row, id_) for column in texts for row in range(2) for id_ in set(IDS[column][row].tolist()) & {1, 2, 3}]
        total = sum(WEIGHTS[role][id_] for _, _, id_ in own)
        expected += sum(WEIGHTS[role][id_] * (-plain[column][row, id_]).exp() for column, row, id_ in own) / total
    assert loss["own_words_regularizer_loss"].item() == pytest.approx(0.5 * expected.item())
    sum(loss.values()).backward()
    (0.5 * expected).backward()
    for one, other in zip(ours, plain, strict=True):
        assert torch.allclose(one.grad, other.grad)


@pytest.mark.parametrize("more", [{}, {"mini_batch_size": 4, "document_active_dims": 4}], ids=["plain", "cached, with a target"])
def test_a_training_with_the_loss_keeps_more_words(more, tmp_path):
    """A heavy regularizer takes the words of a model that starts with all of them."""
    backbone, data, generator = make_lexical(tmp_path / "backbone"), tmp_path / "pairs.jsonl", np.random.default_rng(0)
    words = [generator.choice(WORDS, 8) for _ in range(64)]
    data.write_text("".join(json.dumps({"query": " ".join(w[:2]), "positive": " ".join(w)}) + "\n" for w in words))
    options = {"steps": 12, "batch_size": 8, "learning_rate": 0.05, "k": 1, "shift": 0, "checkpoint_steps": 100} | more
    options |= {"query_regularizer_weight": 0.5, "document_regularizer_weight": 0.5}
    kept = []
    for weight in (0.0, 20.0):
        config = TrainingConfig(backbone, str(data), output=str(tmp_path / str(weight)), own_words=weight, **options)
        result = train(config)
        seen = result.monitoring["observations"]
        assert seen[0]["document_own_words"] == seen[0]["query_own_words"] == 1
        assert ("own_words_regularizer_loss" in result.log[0]) == (weight > 0)
        kept.append(result.document_own_words)
    assert kept[0] < kept[1] - 0.1
    card = (tmp_path / "20.0" / "model" / "README.md").read_text()
    assert f"Own words kept, by idf | {result.query_own_words:.2f} of queries, {kept[1]:.2f} of documents" in card


def test_a_negative_weight_is_refused():
    with pytest.raises(OptionError, match="own_words is -1"):
        TrainingConfig("bert-tiny", "python-docs", output="run", own_words=-1)
