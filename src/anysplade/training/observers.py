"""Losses with an observer, such as the monitor or the controller of regularizer weights."""

from collections.abc import Callable
from typing import Any

from torch import nn


class ObservedLoss(nn.Module):
    """A loss of sentence-transformers that passes the vectors and the value of each batch to an observer."""

    def __init__(self, loss: nn.Module, observer: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self.loss: Any = loss
        self.observer = observer

    def compute_loss_from_embeddings(self, embeddings: Any, *labels: Any) -> Any:
        value = self.loss.compute_loss_from_embeddings(embeddings, *labels)
        self.observer(embeddings, value)
        return value

    def get_config_dict(self) -> dict[str, Any]:
        return {"loss": self.loss}
