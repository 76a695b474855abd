"""One dimension a word: give a cased backbone an uncased tokenizer, and leave its weights as they are.

``python``, ``Python``, `` python`` and `` Python`` are four tokens of a cased vocabulary, and four dimensions of SPLADE: a query
with the one and a document with the other have nothing in common ("Why Advanced Encoders Lag on Sparse Retrieval",
arXiv 2607.00004, calls it the vocabulary gap). Worse, most forms are no tokens: `` Obama`` is one and ``obama`` is two pieces,
`` sort`` is one and the ``sort`` of ``(sort`` may be two. Both come from how text is cut, and are cured there: text is read in
lower case with a space before each word, and the entries of the vocabulary, with the merges that make them, become lower-case too.
So ``obama`` is the entry that `` Obama`` was, with its embedding. Of the entries that become one the most frequent stays, and the
others are switched off: their bias becomes lower than any logit. The checkpoint stays stock, and what is tied stays tied.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from anysplade._common.extras import extra
from anysplade._common.tables import Tabular
from anysplade.errors import ModelError, OptionError
from anysplade.model.head import DEAD, RECORD, check_logits, find_head, require_masked_lm, share_tied
from anysplade.model.options import Fold
from anysplade.model.vocabulary import is_punctuation, lower_entries, marks_spaces, read_entries

_MUTED = -1
# A space goes before each word and number that has none; letters without case stay as they are. At the start of a text it takes the
# place of a mark, because tokenizers 0.23 panics at a match without width there.
_CASED = r"(?=[\p{Lu}\p{Ll}\p{Lt}\p{N}])"
_APART = [
    {"type": "Prepend", "prepend": "\0"},
    {"type": "Replace", "pattern": {"Regex": rf"\x00{_CASED}"}, "content": " "},
    {"type": "Replace", "pattern": {"String": "\0"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": rf"(?<=[^ \p{{L}}\p{{N}}\p{{M}}]){_CASED}"}, "content": " "},
]


@dataclass(frozen=True, repr=False)
class Folding(Tabular):
    """What was folded; lies under ``anysplade`` in the checkpoint's config.json, as ``folding``."""

    by: Fold  # which terms share a dimension
    mute: bool  # punctuation and special tokens have no dimension
    groups: int  # of two terms and more, which are one now
    folded: int  # terms whose dimension is another's
    muted: int  # terms without one
    live: int  # terms that are left

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fold_head(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, by: Fold = "case", mute: bool = False
) -> PreTrainedTokenizerBase:
    """Fold the vocabulary of a masked LM: an uncased tokenizer for the same weights. Calibrate after it, not before.

    The model changes in place: in the decoder's bias, and with ``"stem"`` in the input embeddings. Ties and size stay, and its
    config records what was done.

    Args:
        model: a masked LM of transformers.
        tokenizer: of the model.
        by: ``"case"``: words that are the same up to case and the space before them are one;
            ``"stem"``: English words of one stem too (needs the extra ``evaluation``); ``"none"``: nothing is folded.
        mute: punctuation and special tokens get no dimension.

    Returns:
        The tokenizer that goes with the model now: another one, or the given one where only ``mute`` is asked for or nothing.

    Raises:
        OptionError: the vocabulary has nothing to fold, or was folded before.
        ModelError: there is no head or no bias, the tokenizer does not say what its tokens are, or the logits are not
            ``W h + b``: then the model is left as it was.
    """
    require_masked_lm(model)
    if by == "none" and not mute:
        return tokenizer
    earlier = getattr(model.config, RECORD, None) or {}
    if earlier.get("folding"):
        raise OptionError(f"{model.name_or_path}: was folded before, and is folded once; start from the original")
    share_tied(model)
    head = find_head(model)
    if not head.biases:
        raise ModelError(
            f"{type(model).__name__}: the MLM head has no bias, so no term of it can be switched off; leave out `fold`"
        )
    folded, terms = plan_folding(tokenizer, len(head.decoder.weight), by, mute)
    own, sizes = np.arange(len(terms)), np.bincount(terms[terms >= 0], minlength=len(terms))
    _switch_off(model, terms)
    if by == "stem":
        _read_alike(model, terms)
    done = Folding(
        by=by,
        mute=mute,
        groups=int((sizes > 1).sum()),
        folded=int(((terms != own) & (terms != _MUTED)).sum()),
        muted=int((terms == _MUTED).sum()),
        live=int((terms == own).sum()),
    )
    setattr(model.config, RECORD, earlier | {"folding": asdict(done)})
    return folded


def plan_folding(tokenizer: PreTrainedTokenizerBase, size: int, by: Fold, mute: bool) -> tuple[PreTrainedTokenizerBase, np.ndarray]:
    """The tokenizer of a folded model, and the term whose dimension each term has, (size,): its own id, another's, or -1 for none.

    Raises:
        OptionError, ModelError: there is nothing to fold, or the tokenizer does not say what its tokens are.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer is written in Python and does not say what its tokens are; leave out `fold`"
        )
    cased = by != "none" and folds_by_case(tokenizer)
    if by == "case" and not cased:
        raise OptionError(f"{tokenizer.name_or_path}: its vocabulary has one form of each word already (uncased); leave out `fold`")
    backend, terms = tokenizer.backend_tokenizer, np.arange(size)
    if cased:
        backend, uncased = fold_tokenizer(backend)
        terms[: len(uncased)] = uncased[:size]  # a head can be wider than the vocabulary, or narrower
        tokenizer = _with_backend(tokenizer, backend)
    entries = read_entries(backend, size)
    if by == "stem":
        stems: dict[str, int] = {}
        stem = _stemmer()
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


def fold_tokenizer(tokenizer: Tokenizer) -> tuple[Tokenizer, np.ndarray]:
    """An uncased tokenizer with the entries of a cased one, and the entry that each has become, (entries,).

    Entries and text are put in lower case; text goes through the tokenizer's own normalizer after it. Of the entries that become
    one, the one with the lowest id stays: vocabularies are in the order in which they were learned. The others get names that no
    text has any more. Pieces that continue a word stay apart from words, and scripts without case as they are.
    """
    state = json.loads(tokenizer.to_str())
    apart = _APART if marks_spaces(tokenizer) else []
    after = [state["normalizer"]] if state["normalizer"] else []
    state["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *apart, *after]}
    for token in state["added_tokens"]:
        token["normalized"] = False  # found in the text as it was written, as before
    terms = lower_entries(state, tokenizer)
    return Tokenizer.from_str(json.dumps(state)), terms


def _with_backend(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of no architecture: those of RoBERTa and others build their own normalizer when they are loaded."""
    kept = ("model_max_length", "padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces")
    options = {name: getattr(tokenizer, name) for name in kept} | tokenizer.special_tokens_map
    if extra_tokens := getattr(tokenizer, "extra_special_tokens", None):
        options["extra_special_tokens"] = extra_tokens
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    made.name_or_path = tokenizer.name_or_path
    return made


def _stemmer() -> Callable[[str], str]:
    with extra("evaluation"):
        import Stemmer
    return Stemmer.Stemmer("english").stemWord


def _switch_off(model: PreTrainedModel, terms: np.ndarray) -> None:
    """Switch off the terms whose dimension is another's, by their bias; check what comes out."""
    before, head = check_logits(model), find_head(model)
    dead = torch.from_numpy(terms != np.arange(len(terms))).to(before.device)
    old = [bias.detach().clone() for bias in head.biases]
    with torch.no_grad():
        for bias in head.biases:
            bias.view(-1)[dead] = DEAD
        after = check_logits(model)
        if torch.equal(after[..., ~dead], before[..., ~dead]) and bool((after[..., dead] < DEAD / 2).all()):
            return
        for bias, values in zip(head.biases, old, strict=True):
            bias.copy_(values)
    raise ModelError(
        f"{type(model).__name__}: its logits are not one projection of its hidden states; its vocabulary cannot be folded"
    )


@torch.no_grad()
def _read_alike(model: PreTrainedModel, terms: np.ndarray) -> None:
    """Give each term the input embedding of the term whose dimension it has."""
    embeddings: Any = model.get_input_embeddings()
    source = torch.from_numpy(np.where(terms == _MUTED, np.arange(len(terms)), terms)).to(embeddings.weight.device)
    embeddings.weight[: len(source)] = embeddings.weight[source]
