"""Own words of the training batches: how many the vectors keep, and a loss that asks for them.

``model.own_words`` defines what is measured. In training, the idf comes from a sample of the training documents.
"""

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from torch import Tensor, nn

from anysplade.data.collections import Pair
from anysplade.data.text import replace_surrogates
from anysplade.model.modules import has_static_queries
from anysplade.model.options import Role
from anysplade.model.own_words import counts_as_own, document_frequency, lucene_idf
from anysplade.model.tokenizing import TextReader

_SAMPLE = 2000  # training documents that the idf is taken from
ROLES: tuple[Role, Role] = ("query", "document")


def piece_weights(encoder: SparseEncoder, pairs: Sequence[Pair]) -> dict[Role, Tensor]:
    """The weight of each piece by role, (vocabulary,): its idf in evenly spaced training documents, 0 if it does not count.

    Queries are left out if their terms are their tokens, of which none can be lost.
    """
    count = min(_SAMPLE, len(pairs))
    texts = [replace_surrogates(pairs[i * len(pairs) // count].positive) for i in range(count)]
    ids, lengths = TextReader(encoder, "document").read(texts).flat()
    vocabulary = encoder.get_embedding_dimension() or 0
    idf = lucene_idf(document_frequency(ids, lengths, vocabulary), count)
    counted = {role: counts_as_own(encoder, role) for role in ROLES if role == "document" or not has_static_queries(encoder)}
    return {role: torch.from_numpy(idf * mask).float() for role, mask in counted.items() if mask is not None}


class BatchPieces:
    """The own pieces of the batch at hand. ``read`` is a forward pre-hook of the loss, which gets the tokens of each column.

    Args:
        weights: those of ``piece_weights``.
    """

    def __init__(self, weights: dict[Role, Tensor]) -> None:
        self.weights = weights
        self._features: list[dict[str, Tensor]] = []

    def read(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._features = inputs[0]

    def columns(self, embeddings: Sequence[Tensor]) -> dict[Role, tuple[Tensor, Tensor, Tensor]]:
        """By role: vectors, (texts, vocabulary), whether each term is an own piece of the text, and the weights."""
        found: dict[Role, tuple[Tensor, Tensor, Tensor]] = {}
        for role, part in (("query", slice(0, 1)), ("document", slice(1, None))):
            if role in self.weights:
                columns = list(zip(embeddings[part], self._features[part], strict=True))
                own = torch.cat([_bags(features, vectors) for vectors, features in columns])
                vectors = torch.cat([vectors for vectors, _ in columns])
                self.weights[role] = self.weights[role].to(vectors.device)
                found[role] = (vectors, own, self.weights[role])
        return found

    @torch.no_grad()
    def kept(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Own words kept by the queries and the documents of the batch, (2,); NaN if not known."""
        shares = {}
        for role, (vectors, own, weights) in self.columns(embeddings).items():
            found, total = ((which.sum(dim=0).to(weights.dtype) @ weights) for which in (own & (vectors > 0), own))
            shares[role] = found / total
        unknown = embeddings[0].new_full((), torch.nan, dtype=torch.float32)
        return torch.stack([shares.get(role, unknown) for role in ROLES])


def _bags(features: dict[str, Tensor], vectors: Tensor) -> Tensor:
    """Whether each term is a token of each text, (texts, vocabulary). The host waits for no device."""
    ids, ends = features["input_ids"], features.get("cu_seq_lens_q")
    if ends is not None:  # one row without padding
        number = torch.arange(ids.shape[1], dtype=ends.dtype, device=ids.device)
        texts = torch.searchsorted(ends[1:].contiguous(), number, right=True)
    else:
        texts = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    width = vectors.shape[1]
    bags = torch.zeros(len(vectors), width + 1, dtype=torch.bool, device=vectors.device)  # the last one is for tokens past the head
    bags.view(-1).index_fill_(0, (texts * (width + 1) + ids.clamp(max=width)).reshape(-1), True)
    return bags[:, :width]


class OwnWordsLoss(nn.Module):
    """A ranking loss, and beside it a loss that asks the texts' own pieces to stay active.

    For queries and for documents it is the mean over own pieces of exp(-w), weighted by idf, where w is the piece's weight in
    the vector; the two are added. A lost piece counts 1, so the value is at least the share of own words lost. The gradient is
    bounded by the piece's share of the idf and falls as exp(-w), to 0.14 at a weight of 2. A lost piece has no gradient,
    because SPLADE's activation is flat below 0; it comes back only with its bias, or through texts that still have it.

    Args:
        loss: the ranking loss.
        pieces: those of the batch.
        weight: of the loss beside it.
    """

    def __init__(self, loss: nn.Module, pieces: BatchPieces, weight: float) -> None:
        super().__init__()
        self.loss: Any = loss
        self.pieces = pieces
        self.weight = weight

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> dict[str, Tensor]:
        """``embeddings`` are queries, positives and negatives, (batch, vocabulary) each."""
        value = self.loss.compute_loss_from_embeddings(embeddings, labels)
        parts = value if isinstance(value, dict) else {"base_loss": value}
        return parts | {"own_words_regularizer_loss": self.weight * self.own_words_loss(embeddings)}

    def own_words_loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        """The loss without its weight."""
        total = embeddings[0].new_zeros(())
        for vectors, own, weights in self.pieces.columns(embeddings).values():
            share = own * weights
            total = total + (share * (-vectors).exp()).sum() / share.sum().clamp(min=1e-9)
        return total

    def get_config_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "own_words": self.weight}
