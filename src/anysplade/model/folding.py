"""One dimension per word: give a cased backbone an uncased tokenizer, without changing its weights.

``python``, ``Python``, `` python`` and `` Python`` are four tokens of a cased vocabulary, and so four dimensions of SPLADE: a query
with one form and a document with another have nothing in common ("Why Advanced Encoders Lag on Sparse Retrieval",
arXiv 2607.00004, calls it the vocabulary gap). Moreover, most forms are no tokens: `` Obama`` is one token, but ``obama`` is two.

The remedy changes the tokenizer. It reads text in lower case with a space before each word, and the entries of its vocabulary
become lower-case too, with the merges that make them. So `` Obama`` becomes `` obama``, and keeps its embedding. Among entries that
become equal, the most frequent one stays, and the others are switched off: their bias becomes lower than any logit. The checkpoint
stays stock, and tied weights stay tied.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from anysplade._common.extras import extra
from anysplade._common.tables import Tabular
from anysplade.errors import ModelError, OptionError
from anysplade.model.head import DEAD, RECORD, find_head, require_masked_lm, sample_logits, share_tied
from anysplade.model.options import Fold
from anysplade.model.vocabulary import is_punctuation, lower_entries, marks_spaces, read_entries

_MUTED = -1  # marks terms without a dimension
# Normalizers that put a space before each word and number that has none; letters without case stay as they are. At the start of a
# text the space replaces a "\0", because tokenizers 0.23 panics at a match of zero width there.
_CASED = r"(?=[\p{Lu}\p{Ll}\p{Lt}\p{N}])"
_SPACED = [
    {"type": "Prepend", "prepend": "\0"},
    {"type": "Replace", "pattern": {"Regex": rf"\x00{_CASED}"}, "content": " "},
    {"type": "Replace", "pattern": {"String": "\0"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": rf"(?<=[^ \p{{L}}\p{{N}}\p{{M}}]){_CASED}"}, "content": " "},
]


@dataclass(frozen=True, repr=False)
class Folding(Tabular):
    """Record of a folded vocabulary, stored in the checkpoint's config.json as ``anysplade.folding``."""

    by: Fold  # which terms share a dimension
    mute: bool  # punctuation and special tokens have no dimension
    groups: int  # number of dimensions that several terms share
    folded: int  # number of terms that use another term's dimension
    muted: int  # number of terms without a dimension
    live: int  # number of dimensions that are left


def fold_head(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, by: Fold = "case", mute: bool = False
) -> PreTrainedTokenizerBase:
    """Fold the vocabulary of a masked LM: an uncased tokenizer for the same weights. Calibrate after folding, not before.

    The decoder's bias changes in place, and with ``"stem"`` the input embeddings too. Ties and size stay, and the model's config
    records the folding.

    Args:
        model: a masked LM of transformers.
        tokenizer: of the model.
        by: which words share a dimension. ``"case"``: words that differ only in case and the space before them; ``"stem"``: English
            words with the same stem too (needs the extra ``evaluation``); ``"none"``: no words.
        mute: punctuation and special tokens get no dimension.

    Returns:
        The tokenizer to use with the model from now on: a new one, or the given one if no words are folded.

    Raises:
        OptionError: the vocabulary has nothing to fold, or was folded before.
        ModelError: there is no head or no bias, the tokenizer does not say what its tokens are, or the logits are not ``W h + b``.
            The model is unchanged then.
    """
    require_masked_lm(model)
    if by == "none" and not mute:
        return tokenizer
    earlier = getattr(model.config, RECORD, None) or {}
    if earlier.get("folding"):
        raise OptionError(f"{model.name_or_path}: was folded before, which works only once; start from the original")
    share_tied(model)
    head = find_head(model)
    if not head.biases:
        raise ModelError(f"{type(model).__name__}: the MLM head has no bias, so no term can be switched off; leave out `fold`")
    folded, terms = plan_folding(tokenizer, len(head.decoder.weight), by, mute)
    _switch_off(model, terms)
    if by == "stem":
        _share_embeddings(model, terms)
    is_own, is_muted = terms == np.arange(len(terms)), terms == _MUTED
    done = Folding(
        by=by,
        mute=mute,
        groups=int((np.bincount(terms[~is_muted]) > 1).sum()),
        folded=int((~is_own & ~is_muted).sum()),
        muted=int(is_muted.sum()),
        live=int(is_own.sum()),
    )
    setattr(model.config, RECORD, earlier | {"folding": done.to_dict()})
    return folded


def plan_folding(tokenizer: PreTrainedTokenizerBase, size: int, by: Fold, mute: bool) -> tuple[PreTrainedTokenizerBase, np.ndarray]:
    """The tokenizer of a folded model, and the id of the term whose dimension each term uses, (size,); -1 for no dimension."""
    if not tokenizer.is_fast:
        name = tokenizer.name_or_path
        raise ModelError(f"{name}: its tokenizer is written in Python and does not say what its tokens are; leave out `fold`")
    cased = by != "none" and folds_by_case(tokenizer)
    if by == "case" and not cased:
        raise OptionError(f"{tokenizer.name_or_path}: its vocabulary has one form of each word already (uncased); leave out `fold`")
    backend, terms = tokenizer.backend_tokenizer, np.arange(size)
    if cased:
        backend, uncased = _fold_tokenizer(backend)
        terms[: len(uncased)] = uncased[:size]  # a head can be wider than the vocabulary, or narrower
        tokenizer = _with_backend(tokenizer, backend)
    entries = read_entries(backend, size)
    if by == "stem":
        with extra("evaluation"):
            import Stemmer
        stem = Stemmer.Stemmer("english").stemWord
        stems: dict[str, int] = {}
        words = [entry for entry in entries if entry.begins and terms[entry.id] == entry.id]
        kept = {entry.id: stems.setdefault(stem(entry.text), entry.id) for entry in words}
        terms = np.array([kept.get(term, term) for term in terms.tolist()])
    if mute:
        special = [id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special and id_ < size]
        terms[[*special, *(entry.id for entry in entries if is_punctuation(entry.text))]] = _MUTED
    return tokenizer, terms


def folds_by_case(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a vocabulary has capital letters."""
    if not tokenizer.is_fast:
        return False
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().keys()
    entries = read_entries(tokenizer.backend_tokenizer, max(tokenizer.get_vocab().values(), default=-1) + 1)
    return any(entry.text != entry.text.lower() and entry.id not in added for entry in entries)


def _fold_tokenizer(tokenizer: Tokenizer) -> tuple[Tokenizer, np.ndarray]:
    """An uncased tokenizer with the entries of a cased one, and the id that each entry has become, (entries,).

    Pieces that continue a word stay distinct from words, and scripts without case stay as they are.
    """
    state = json.loads(tokenizer.to_str())
    spaced = _SPACED if marks_spaces(tokenizer) else []
    own = [state["normalizer"]] if state["normalizer"] else []
    state["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *spaced, *own]}
    for token in state["added_tokens"]:
        token["normalized"] = False  # found in the text before it is changed
    terms = lower_entries(state, tokenizer)
    return Tokenizer.from_str(json.dumps(state)), terms


def _with_backend(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of a general class: those of RoBERTa and others build their own normalizer when they are loaded."""
    kept = ("model_max_length", "padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces")
    options = {name: getattr(tokenizer, name) for name in kept} | tokenizer.special_tokens_map
    if extra_tokens := getattr(tokenizer, "extra_special_tokens", None):
        options["extra_special_tokens"] = extra_tokens
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    made.name_or_path = tokenizer.name_or_path
    return made


def _switch_off(model: PreTrainedModel, terms: np.ndarray) -> None:
    """Switch off the terms without a dimension of their own, and check the result."""
    before, head = sample_logits(model), find_head(model)
    dead = torch.from_numpy(terms != np.arange(len(terms))).to(before.device)
    old = [bias.detach().clone() for bias in head.biases]
    with torch.no_grad():
        for bias in head.biases:
            bias.view(-1)[dead] = DEAD
        after = sample_logits(model)
        if torch.equal(after[..., ~dead], before[..., ~dead]) and bool((after[..., dead] < DEAD / 2).all()):
            return
        for bias, values in zip(head.biases, old, strict=True):
            bias.copy_(values)
    name = type(model).__name__
    raise ModelError(f"{name}: its logits are not one projection of its hidden states; its vocabulary cannot be folded")


@torch.no_grad()
def _share_embeddings(model: PreTrainedModel, terms: np.ndarray) -> None:
    """Give each term the input embedding of the term whose dimension it uses."""
    embeddings: Any = model.get_input_embeddings()
    source = torch.from_numpy(np.where(terms == _MUTED, np.arange(len(terms)), terms)).to(embeddings.weight.device)
    embeddings.weight[: len(source)] = embeddings.weight[source]
