"""The MLM head of a masked language model: find it, list the terms it can give, and untie its weights.

SPLADE reads a text as ``max over tokens of log(1 + relu(logits))`` with ``logits = W h + b``. The last projection of the head, with
weight W and bias b, is called the *decoder*.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anysplade._common.arguments import require
from anysplade.errors import ModelError

DEAD = -8192.0  # bias of a term that is switched off: below any logit, and exact in half precision
RECORD = "anysplade"  # key in a checkpoint's config.json that records what was done to its head


@dataclass(frozen=True)
class Head:
    """The last projection of a masked LM."""

    decoder: nn.Linear  # .weight: (vocabulary, width); a few architectures use a class of their own
    biases: tuple[Tensor, ...]  # the distinct tensors registered as its bias, (vocabulary,) or (1, vocabulary)

    @property
    def bias(self) -> Tensor | None:  # (vocabulary,)
        return self.biases[0].detach().reshape(-1) if self.biases else None


def find_head(model: PreTrainedModel) -> Head:
    """The decoder of a masked LM and its bias, wherever the architecture stores them; raises ModelError if there is none."""
    decoder = model.get_output_embeddings()
    weight = getattr(decoder, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ModelError(f"{type(model).__name__} has no projection onto its vocabulary; SPLADE needs a masked LM with an MLM head")
    name = next(n for n, module in model.named_modules() if module is decoder)
    parent = model.get_submodule(name.rpartition(".")[0])
    # nn.Linear has its own bias; ESM stores it in the decoder's parent; BART adds a buffer to the logits.
    candidates = (getattr(decoder, "bias", None), getattr(parent, "bias", None), getattr(model, "final_logits_bias", None))
    found = {id(b): b for b in candidates if isinstance(b, Tensor) and b.numel() == weight.shape[0]}
    return Head(decoder, tuple(found.values()))


def require_masked_lm(model: object) -> None:
    """Raise OptionError unless the argument is a model of transformers."""
    require("model", model, PreTrainedModel, "give a loaded masked LM, as AutoModelForMaskedLM.from_pretrained returns it")


@torch.no_grad()
def live_terms(model: PreTrainedModel) -> Tensor | None:
    """Ids of the terms that are not switched off, ascending, (live,); None if all are live. ``fold_head`` switches terms off."""
    bias = find_head(model).bias
    if bias is None or not bool((off := switched_off(bias)).any()):
        return None
    return (~off).nonzero()[:, 0]


def switched_off(bias: Tensor) -> Tensor:
    """Whether each term is switched off, in the shape of the bias: its value is ``DEAD``, up to what training changes."""
    return (bias - DEAD).abs() <= abs(DEAD) / 100


@torch.no_grad()
def sample_logits(model: PreTrainedModel) -> Tensor:
    """Logits of sixteen fixed tokens, (2, 8, vocabulary), to compare before and after a change."""
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    ids = (torch.arange(16, device=model.device).reshape(2, 8) * 7919 + vocabulary // 3) % vocabulary
    was_training = model.training
    try:
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    finally:
        model.train(was_training)


# ------------------------------------------------------------------------------------ tied weights


def untie_head(model: PreTrainedModel) -> Callable[[], None]:
    """Give the decoder a weight of its own, in place; other ties stay (``share_tied``). Returns a function that undoes it."""
    decoder, tie = find_head(model).decoder, model.config.tie_word_embeddings
    tied = decoder.weight
    decoder.weight = nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad)

    def switch(tie: bool) -> None:
        model.config.tie_word_embeddings = tie
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)

    def undo() -> None:
        decoder.weight = tied
        switch(tie)

    switch(False)
    share_tied(model)
    return undo


@torch.no_grad()
def share_tied(model: PreTrainedModel) -> None:
    """Make all names of a tensor refer to that one tensor, in memory and in saved files, even without ``tie_word_embeddings``.

    Most heads register their bias under two names, such as ``cls.predictions.bias`` and ``cls.predictions.decoder.bias``. Without
    the flag, transformers loads two separate biases; training then changes only the one that makes the logits, and other software
    may read the other one. If the two differ already, the one that makes the logits is right.
    """
    decoder, tie = model.get_output_embeddings(), getattr(model.config, "tie_word_embeddings", False)
    weight: Any = getattr(decoder, "weight", None)
    bias: Any = getattr(decoder, "bias", None)
    model.config.tie_word_embeddings = True  # otherwise transformers lists no names
    names = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.config.tie_word_embeddings = tie
    known = dict(model.named_parameters(remove_duplicate=False))  # lacks those that an adapter has renamed
    for name, other in names.items():
        pair = [known[key] for key in (name, other) if key in known]
        if len(pair) < 2 or any(tensor is weight for tensor in pair):
            continue
        if any(tensor is bias for tensor in pair):
            for tensor in pair:
                tensor.copy_(bias)
        if torch.equal(*pair):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, known[other])
    if _write_every_name not in model._state_dict_hooks.values():
        model.register_state_dict_post_hook(_write_every_name)


def _write_every_name(model: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Hook of ``state_dict``: write a tensor under all its names, because without the flag transformers reads each name alone."""
    if model.config.tie_word_embeddings:
        return
    seen = set()
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if tensor in seen:
            state[prefix + name] = tensor.detach().clone()
        seen.add(tensor)
