"""An MLM head for an encoder that has none, such as a dense embedding model, trained on plain text.

SPLADE reads the weight of a term off the largest logit that the head gives it at any token. The loss has up to three parts: tokens
that can be seen are to be named where they stand; the largest logits are to name a text's words, rare ones above all; and
masked tokens are to be guessed from their context (Devlin et al., arXiv 1810.04805). The encoder stays as it is, or is trained
with the head, each layer at a lower rate than the one above it.
"""

import json
import logging
import math
import os
import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from anysplade._common.arguments import require
from anysplade._common.files import (
    atomic_folder,
    beside,
    damaged_file,
    digests,
    only_process,
    read_record,
    require_empty,
    user_path,
    write_atomic,
    writing,
)
from anysplade._common.hashing import DataHash
from anysplade._common.provenance import provenance
from anysplade._common.tables import Tabular
from anysplade.data.corpus import read_texts
from anysplade.errors import AnyspladeError, DataError, ModelError, OptionError, OutputError
from anysplade.model.encoder import encoder_folder
from anysplade.model.fused import hidden_states, why_not_fused
from anysplade.model.head import check_length, find_head, fit_tokenizer, masked_lm_class, missing_is_expected, missing_weights
from anysplade.model.options import checked_option
from anysplade.model.pooling import max_logits, native_bfloat16
from anysplade.model.saved import fingerprint, resolve_model
from anysplade.training.callbacks import EndsOnce, Estimate, MarkComplete, Progress, last_checkpoint

logger = logging.getLogger(__name__)

_WEIGHTS = {"masked": 0.0, "named": 1.0, "bag": 0.3}  # of the parts of the loss; a part of weight 0 is not computed
_MASKED = 0.2  # of a text's tokens are to be guessed
_NAMED = 0.2  # are to be named as they stand there
_BAGS = 0.5  # of a batch's texts are to be named as bags of words
_COUNTED = 2000  # texts whose tokens are counted, for the decoder's bias and the rarity of tokens
_CHARACTERS = 6  # a token, of a text that is cut into pieces: more than there are, so that a piece fills its tokens


@dataclass(frozen=True, repr=False)
class HeadTraining(Tabular):
    """What ``train_head`` did; lies in ``head.json`` beside the weights."""

    model: str  # the new masked LM's folder
    encoder: str  # what it was made from
    architecture: str  # class of transformers
    text: str  # what was trained on, as it was named
    texts: int  # pieces of it
    data_hash: str  # SHA-256 of them
    options: dict[str, Any]  # of ``train_head``, and the weights of the loss's parts
    seconds: float  # of training, in this process
    # Its parts without their weights, means over the first and over the last tenth of the steps: "named" is the cross-entropy of
    # naming tokens that can be seen, "bag" of naming a text's words by its largest logits, "masked" of guessing masked tokens.
    losses: dict[str, list[float]]
    provenance: dict[str, Any]  # versions, commit, hardware, command
    precision: str | None = None  # of the products, in this process: bfloat16 where the machine has it; not in older records

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train_head(
    encoder: str | Path,
    text: str | Path,
    output: str | Path,
    *,
    steps: int = 300,
    batch_size: int = 16,
    max_length: int = 96,
    learning_rate: float = 2e-3,
    encoder_learning_rate: float = 0.0,
    layer_decay: float = 0.7,
    seed: int = 0,
    checkpoint_steps: int = 100,
    progress: bool = False,
) -> HeadTraining:
    """Give an encoder an MLM head, tied to its input embeddings, and write it as a stock masked LM.

    Called again with the same options after an interruption, it continues from the last checkpoint; finished, it returns what
    was recorded.

    Args:
        encoder: a folder or hub id of a dense model of sentence-transformers, or of an encoder of transformers.
        text: a corpus (BEIR folder, JSONL, ...) or a text file with one text a line; what the model will search is best.
        output: the masked LM's folder.
        steps: of training; each sees ``batch_size`` texts.
        batch_size: texts a step.
        max_length: tokens of a piece of text; longer texts are cut into pieces.
        learning_rate: peak, of the head.
        encoder_learning_rate: peak, of the encoder's top layer; 0 leaves the encoder as it is.
        layer_decay: a layer's rate is so many times that of the layer above it.
        seed: of everything random.
        checkpoint_steps: steps between checkpoints.

    Raises:
        ModelError: no encoder, one that has an MLM head already, or one whose architecture has none in transformers.
        DataError: there is no text.
        OutputError: the folder holds something else.
        OptionError: an impossible option.
        AnyspladeError: the training diverged.
    """
    for argument, given in (("encoder", encoder), ("text", text)):
        require(argument, given, (str, Path), "give its path, or its name on the hub")
    encoder, text, output = str(encoder), str(text), user_path(output)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError("a head is trained by one process; start it without torchrun")
    lowest = {
        "steps": (steps, 1),
        "batch_size": (batch_size, 1),
        "max_length": (max_length, 8),
        "checkpoint_steps": (checkpoint_steps, 1),
    }
    for name, (value, low) in lowest.items():
        if checked_option(name, value, int) < low:
            raise OptionError(f"{name} is {value}: it must be at least {low}")
    steps, batch_size, max_length, checkpoint_steps = (int(value) for value, _ in lowest.values())
    if not (0 < learning_rate < 1 and 0 <= encoder_learning_rate < 1 and 0 < layer_decay <= 1):
        raise OptionError(
            f"learning_rate {learning_rate}, encoder_learning_rate {encoder_learning_rate}, layer_decay {layer_decay}: "
            "rates lie between 0 and 1"
        )
    source = resolve_model(encoder)
    folder = encoder_folder(source)
    _check_encoder(source, folder)
    pieces = sample_pieces(text, steps * batch_size, max_length * _CHARACTERS, seed)
    options = {
        "steps": steps,
        "batch_size": batch_size,
        "max_length": max_length,
        "learning_rate": learning_rate,
        "encoder_learning_rate": encoder_learning_rate,
        "layer_decay": layer_decay,
        "seed": seed,
        "weights": dict(_WEIGHTS),
    }
    data_hash = DataHash(pieces).hexdigest()
    about = {"fingerprint": fingerprint(source), "data_hash": data_hash, "options": options}
    parts = beside(output, "{}.parts")  # checkpoints, until the folder is whole
    with only_process(parts):
        finished = _claim(output, parts, about)
        if finished is not None:
            shutil.rmtree(parts, ignore_errors=True)  # of a training that ended between its last two lines
            logger.info("%s holds this head already", output)
            return finished
        set_seed(seed)
        model, tokenizer = with_new_head(source, folder)
        check_length(model, max_length)
        write_atomic(parts / "about.json", json.dumps(about, indent=2) + "\n")
        counts = _token_counts(model, tokenizer, pieces[:_COUNTED], max_length)
        start_biases(model, counts)
        trainer = _HeadTrainer(
            model=model,
            args=_arguments(parts, options, checkpoint_steps),
            train_dataset=pieces,  # a sequence with a length is all the trainer needs
            data_collator=_Collator(tokenizer, max_length),
            callbacks=[MarkComplete(), Progress() if progress else Estimate()],
            tokenizer=tokenizer,
            counts=counts,
            encoder_learning_rate=encoder_learning_rate,
            layer_decay=layer_decay,
        )
        trainer.remove_callback(PrinterCallback)
        checkpoint = last_checkpoint(parts)
        start = time.perf_counter()
        with writing(parts):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        result = HeadTraining(
            model=str(output),
            encoder=encoder,
            architecture=type(model).__name__,
            text=text,
            texts=len(pieces),
            data_hash=data_hash,
            options=options,
            seconds=time.perf_counter() - start,
            losses={
                name: _first_and_last(trainer.state.log_history, f"{name}_loss") for name, weight in _WEIGHTS.items() if weight
            },
            provenance=provenance(),
            precision="bfloat16" if trainer.args.bf16 else "float32",
        )
        if not all(math.isfinite(value) for values in result.losses.values() for value in values):
            raise AnyspladeError(
                f"{output}: the training diverged (losses {result.losses}); lower `learning_rate`, and remove {parts}"
            )
        with atomic_folder(output) as whole:
            model.eval().save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            record = about | result.to_dict() | {"files": digests(whole)}
            write_atomic(whole / "head.json", json.dumps(record, indent=2) + "\n")
        shutil.rmtree(parts)
        return result


# ------------------------------------------------------------------------------------- a new head


def _check_encoder(source: str, folder: str) -> None:
    """Refuse what cannot be given an MLM head, before the text is read.

    Raises:
        ModelError: its config cannot be read, its architecture has no masked LM in transformers, or it has a trained head.
    """
    model_class = masked_lm_class(source, folder)
    missing = missing_weights(model_class, source, folder)
    body = [key for key in missing if key.startswith(f"{model_class.base_model_prefix}.")]
    if body:
        raise ModelError(f"{source}: the checkpoint lacks weights ({body[0]} is one of {len(body)}); was it saved whole?")
    if not missing:
        raise ModelError(f"{source}: has an MLM head already; use it as it is, as the backbone of `anysplade train`")


def with_new_head(source: str, folder: str = "") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The masked LM of an encoder: its own weights, a decoder tied to its input embeddings, and a head that begins as the identity.

    A square projection of the head begins as the identity; other weights begin as transformers draws them.

    Args:
        folder: below the source, where the encoder lies in it.

    Raises:
        ModelError: the tokenizer is not the encoder's or has no mask token, or the decoder is not tied or not the last step.
    """
    missing = set(missing_weights(masked_lm_class(source, folder), source, folder))
    options: dict[str, Any] = {"subfolder": folder, "trust_remote_code": False}
    with missing_is_expected():
        model = AutoModelForMaskedLM.from_pretrained(source, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    fit_tokenizer(tokenizer, model, source)
    if tokenizer.mask_token_id is None:
        raise ModelError(f"{source}: its tokenizer has no mask token, so a head cannot be trained on its text; use another encoder")
    if find_head(model).decoder.weight is not model.get_input_embeddings().weight:
        raise ModelError(f"{source}: {type(model).__name__} does not tie its decoder to the input embeddings; use another encoder")
    if reason := why_not_fused(model):
        raise ModelError(f"{source}: {reason}, so a head cannot be trained; use another encoder")
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key in missing and weight.dim() == 2 and weight.shape[0] == weight.shape[1]:
                weight.copy_(torch.eye(len(weight)))
    return model, tokenizer


def _token_counts(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], max_length: int) -> Tensor:
    """How often each token is in the texts, and one more, (vocabulary,)."""
    counts = torch.ones(find_head(model).decoder.weight.shape[0])
    for ids in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]:
        counts += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=len(counts))
    return counts


@torch.no_grad()
def start_biases(model: PreTrainedModel, counts: Tensor) -> None:
    """Set the decoder's bias to the logarithm of each token's count, less the mean: what a head learns first."""
    frequency = counts.log()
    for bias in find_head(model).biases:
        bias.copy_((frequency - frequency.mean()).reshape(bias.shape))


# --------------------------------------------------------------------------------------- training


class _Collator:
    """Texts to padded tokens."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        found = self.tokenizer(texts, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}


class _HeadTrainer(EndsOnce, Trainer):
    """Trains the head, with the loss in parts; what is masked and what is named is drawn anew in each step."""

    def __init__(self, tokenizer: Any, counts: Tensor, encoder_learning_rate: float, layer_decay: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.special = torch.tensor(tokenizer.all_special_ids)  # neither masked nor named
        self.rarity = -(counts / counts.sum()).log()  # (vocabulary,)
        self.rarity[self.special] = 0
        self.mask_token: int = tokenizer.mask_token_id
        self.encoder_learning_rate = encoder_learning_rate
        self.layer_decay = layer_decay
        self.parts: dict[str, list[float]] = {}  # of the loss, since the last log

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW, with a learning rate for the head and one for each layer of the encoder, lower from layer to layer."""
        model: Any = self.model
        if self.optimizer is None:
            rates = layer_rates(model, self.encoder_learning_rate, self.layer_decay)
            groups: dict[float, list[nn.Parameter]] = {}
            for name, weight in model.named_parameters():
                rate = rates.get(name, self.args.learning_rate)
                weight.requires_grad_(rate > 0)
                if rate > 0:
                    groups.setdefault(rate, []).append(weight)
            self.optimizer = torch.optim.AdamW(
                [{"params": weights, "lr": rate} for rate, weights in groups.items()], weight_decay=0.01
            )
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs | {f"{name}_loss": sum(values) / len(values) for name, values in self.parts.items()}, *args, **kwargs)
        self.parts.clear()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        model.eval()  # without dropout
        parts = self.loss_parts(model, inputs["input_ids"], inputs["attention_mask"])
        for name, part in parts.items():
            self.parts.setdefault(name, []).append(float(part.detach()))
        return sum(_WEIGHTS[name] * part for name, part in parts.items())

    def loss_parts(self, model: Any, ids: Tensor, attention: Tensor) -> dict[str, Tensor]:
        """The parts of the loss whose weight is not 0, of a batch: ids and attention mask, (batch, length)."""
        decoder = find_head(model).decoder
        words = attention.bool() & ~torch.isin(ids, self.special.to(ids.device))
        draw, how = torch.rand(ids.shape, device=ids.device), torch.rand(ids.shape, device=ids.device)
        chosen = {"masked": words & (draw < _MASKED), "named": words & (draw >= 1 - _NAMED)}
        seen = ids
        if _WEIGHTS["masked"]:
            seen = ids.masked_fill(chosen["masked"] & (how < 0.8), self.mask_token)
            seen = torch.where(chosen["masked"] & (how >= 0.9), torch.randint_like(ids, len(decoder.weight)), seen)
        hidden = hidden_states(model, input_ids=seen, attention_mask=attention)
        parts = {}
        for name, where in chosen.items():
            if _WEIGHTS[name]:
                total = nn.functional.cross_entropy(decoder(hidden[where]).float(), ids[where], reduction="sum")
                parts[name] = total / max(1, int(where.sum()))
        if _WEIGHTS["bag"]:
            few = math.ceil(len(ids) * _BAGS)
            logits = max_logits(hidden[:few], decoder.weight, decoder.bias, attention[:few]).float()
            bags = torch.zeros_like(logits).scatter_(1, ids[:few], 1) * self.rarity.to(ids.device)  # padding is special
            parts["bag"] = nn.functional.cross_entropy(logits, bags / bags.sum(dim=1, keepdim=True).clamp_min(1e-9))
        return parts


_LAYER = re.compile(r"\.(?:layers?|blocks?|h)\.(\d+)\.")


def layer_rates(model: PreTrainedModel, top: float, decay: float) -> dict[str, float]:
    """The learning rate of each of the encoder's weights, by name: ``top`` in the top layer, lower by ``decay`` in each below it.

    What is in no layer, embeddings above all, counts as one more layer below.
    """
    prefix = f"{model.base_model_prefix}."
    body = {name: _LAYER.search(name) for name, _ in model.named_parameters() if name.startswith(prefix)}
    layers = 1 + max((int(found[1]) for found in body.values() if found), default=-1)
    return {name: top * decay ** (layers - 1 - int(found[1]) if found else layers) for name, found in body.items()}


def _arguments(folder: Path, options: dict[str, Any], checkpoint_steps: int) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options["steps"],
        per_device_train_batch_size=options["batch_size"],
        learning_rate=options["learning_rate"],
        warmup_steps=0.06,
        seed=options["seed"],
        data_seed=options["seed"],
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=checkpoint_steps,
        save_total_limit=2,
        logging_steps=10,
        logging_first_step=True,
        report_to="none",
        disable_tqdm=True,
        bf16=native_bfloat16("cuda" if gpu else "cpu"),
        dataloader_pin_memory=gpu,
        use_cpu=not gpu and not torch.backends.mps.is_available(),
    )
    _ = arguments.device  # counts the GPUs
    arguments._n_gpu = min(1, arguments.n_gpu)  # each of several would take a batch of its own
    return arguments


def sample_pieces(text: str, count: int, characters: int, seed: int) -> list[str]:
    """Up to ``count`` pieces of the texts of a source, drawn at random in one pass, in random order; memory is that of the pieces.

    Args:
        characters: of a piece at most; a longer text is cut at white space where it has some.

    Raises:
        DataError: there is no text in it.
    """
    draw = random.Random(seed)
    kept: list[str] = []
    for seen, piece in enumerate(piece for one in read_texts(text) for piece in _pieces(one, characters)):
        if seen < count:
            kept.append(piece)
        elif (place := draw.randrange(seen + 1)) < count:
            kept[place] = piece
    if not kept:
        raise DataError(f"{text}: no text in it; a head is trained on a corpus, or on a file with one text a line")
    draw.shuffle(kept)
    return kept


def _pieces(text: str, characters: int) -> Iterator[str]:
    text = " ".join(text.split())
    start = 0
    while start < len(text):
        end = start + characters
        if end < len(text):
            end = text.rfind(" ", start + characters // 2, end + 1) + 1 or end
        yield text[start:end].strip()
        start = end


def _first_and_last(log: list[dict[str, float]], name: str) -> list[float]:
    """Mean over the first and over the last tenth of what was logged."""
    values = [entry[name] for entry in log if name in entry]
    tenth = max(1, len(values) // 10)
    return [sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth]


def _claim(output: Path, parts: Path, about: dict[str, Any]) -> HeadTraining | None:
    """Check that the output is new or of this very training; its record if it is finished and whole."""
    known = output / "head.json" if (output / "head.json").is_file() else parts / "about.json"
    before = read_record(known, *about)
    if before is None and known.parent == parts:
        require_empty(output)
        for checkpoint in parts.glob("checkpoint-*"):  # nobody knows what they are of
            shutil.rmtree(checkpoint)
        return None
    damaged = "head.json" if before is None else damaged_file(output, before.get("files", {}))
    if before is None or damaged:
        raise OutputError(f"{output}: {damaged} is missing or damaged; remove the folder, and the same again makes it anew")
    old, new = before["options"], about["options"]
    different = [f"{name} {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]]
    # The sample of the text depends on the options.
    changed = [name for name, key in (("encoder", "fingerprint"), ("text", "data_hash")) if before[key] != about[key]]
    if different or changed:
        what = f"other options ({'; '.join(different)})" if different else f"another {' and '.join(changed)} or version"
        raise OutputError(f"{output}: a head with {what}; choose another `output` or remove {known.parent}")
    if known.parent == parts:
        require_empty(output)
        return None
    return HeadTraining(**{field.name: before[field.name] for field in fields(HeadTraining) if field.name in before})
