"""The trainer of a new MLM head: the parts of its loss, and a learning rate for each layer."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from anysplade.model.fused import hidden_states
from anysplade.model.hardware import native_bfloat16
from anysplade.model.head import find_head
from anysplade.model.pooling import max_logits
from anysplade.training.callbacks import EndsOnce, Estimate, MarkComplete, Progress, common_arguments
from anysplade.training.devices import use_one_gpu
from anysplade.training.steps import Steps

WEIGHTS = {"masked": 0.0, "named": 1.0, "bag": 0.3}  # of the parts of the loss; a part with weight 0 is not computed
_MASKED = 0.2  # share of a text's tokens to guess from their context
_NAMED = 0.2  # share of a text's tokens to name where they are
_BAGS = 0.5  # share of a batch's texts to name as bags of words
_LAYER = re.compile(r"\.(?:layers?|blocks?|h)\.(\d+)\.")  # number of the layer in the name of a weight


class HeadTrainer(Steps, EndsOnce, Trainer):
    """Trains a head on pieces of text; ``options`` are those of ``train_head``.

    ``counts``, (vocabulary,), says how often each token is in a sample of the texts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pieces: Any,
        counts: Tensor,
        arguments: TrainingArguments,
        options: dict[str, Any],
        progress: bool,
    ) -> None:
        callbacks: list[Any] = [MarkComplete(), Progress() if progress else Estimate()]
        super().__init__(model, arguments, train_dataset=pieces, data_collator=self._tokenized, callbacks=callbacks)
        self.remove_callback(PrinterCallback)  # it would print to standard output, which is for the result
        self._tokenizer = tokenizer
        self.mask_token: int = tokenizer.mask_token_id
        self.options = options
        self.special = torch.tensor(tokenizer.all_special_ids, device=arguments.device)  # neither masked nor named
        self.rarity = -(counts / counts.sum()).log().to(arguments.device)  # (vocabulary,)
        self.rarity[self.special] = 0
        self.parts: dict[str, list[Tensor]] = {}  # values of the loss's parts since the last log

    def _tokenized(self, texts: list[str]) -> dict[str, Tensor]:
        length = self.options["max_length"]
        found = self._tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW with a learning rate for the head and one for each layer of the encoder."""
        model: Any = self.model
        if self.optimizer is None:
            rates = layer_rates(model, self.options["encoder_learning_rate"], self.options["layer_decay"])
            groups: dict[float, list[nn.Parameter]] = {}
            for name, weight in model.named_parameters():
                rate = rates.get(name, self.args.learning_rate)
                weight.requires_grad_(rate > 0)
                if rate > 0:
                    groups.setdefault(rate, []).append(weight)
            parameters = [{"params": weights, "lr": rate} for rate, weights in groups.items()]
            fused = self.args.device.type == "cuda" or None
            self.optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, fused=fused)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        means = {f"{name}_loss": sum(torch.stack(values).tolist()) / len(values) for name, values in self.parts.items()}
        super().log(logs | means, *args, **kwargs)
        self.parts.clear()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        model.eval()  # without dropout
        parts = self.loss_parts(model, inputs["input_ids"], inputs["attention_mask"])
        for name, part in parts.items():
            self.parts.setdefault(name, []).append(part.detach())
        return sum(WEIGHTS[name] * part for name, part in parts.items())

    def loss_parts(self, model: Any, ids: Tensor, attention: Tensor) -> dict[str, Tensor]:
        """The parts of the loss whose weight is not 0, from token ids and attention mask, (batch, length) each.

        The masked and named tokens are drawn anew in each step.
        """
        decoder = find_head(model).decoder
        words = attention.bool() & ~torch.isin(ids, self.special)
        draw, how = torch.rand(ids.shape, device=ids.device), torch.rand(ids.shape, device=ids.device)
        chosen = {"masked": words & (draw < _MASKED), "named": words & (draw >= 1 - _NAMED)}
        seen = ids
        if WEIGHTS["masked"]:
            seen = ids.masked_fill(chosen["masked"] & (how < 0.8), self.mask_token)
            seen = torch.where(chosen["masked"] & (how >= 0.9), torch.randint_like(ids, len(decoder.weight)), seen)
        hidden = hidden_states(model, input_ids=seen, attention_mask=attention)
        parts = {}
        for name, where in chosen.items():
            if WEIGHTS[name]:
                places = where.nonzero(as_tuple=True)  # the host waits to know their number
                total = nn.functional.cross_entropy(decoder(hidden[places]).float(), ids[places], reduction="sum")
                parts[name] = total / max(1, len(places[0]))
        if WEIGHTS["bag"]:
            few = math.ceil(len(ids) * _BAGS)
            logits = max_logits(hidden[:few], decoder.weight, decoder.bias, attention[:few]).float()
            bags = torch.zeros_like(logits).scatter_(1, ids[:few], 1) * self.rarity  # padding is special
            parts["bag"] = nn.functional.cross_entropy(logits, bags / bags.sum(dim=1, keepdim=True).clamp_min(1e-9))
        return parts


def layer_rates(model: PreTrainedModel, top: float, decay: float) -> dict[str, float]:
    """The learning rate of each of the encoder's weights, by name: ``top`` in the top layer, times ``decay`` per layer below.

    Weights in no layer, such as embeddings, count as the lowest layer.
    """
    prefix = f"{model.base_model_prefix}."
    body = {name: _LAYER.search(name) for name, _ in model.named_parameters() if name.startswith(prefix)}
    layers = 1 + max((int(found[1]) for found in body.values() if found), default=-1)
    return {name: top * decay ** (layers - 1 - int(found[1]) if found else layers) for name, found in body.items()}


def head_arguments(folder: Path, options: dict[str, Any], checkpoint_steps: int) -> TrainingArguments:
    """The trainer's arguments, for one GPU or none."""
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options["steps"],
        per_device_train_batch_size=options["batch_size"],
        learning_rate=options["learning_rate"],
        warmup_steps=0.06,
        remove_unused_columns=False,
        report_to="none",
        bf16=native_bfloat16(device),
        logging_nan_inf_filter=False,  # it waits for every loss
        **common_arguments(options["seed"], checkpoint_steps),
    )
    use_one_gpu(arguments)
    return arguments
