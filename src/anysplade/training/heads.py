"""An MLM head for an encoder that has none, such as a dense embedding model, trained on plain text.

SPLADE reads the weight of a term off the logit that the head gives it, so a head must name, at each token, the token itself and
words that could stand in its place. Both are trained on the same texts: masked tokens are to be guessed from their context
(Devlin et al., arXiv 1810.04805), and tokens that can be seen are to be named. The encoder is trained too, each layer at a lower
rate than the one above it. What else was tried stands in docs/heads.md.
"""

import hashlib
import json
import logging
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

from anysplade._common.files import require_empty, whole_folder, write_whole
from anysplade._common.provenance import provenance
from anysplade.data.collections import read_texts
from anysplade.errors import AnyspladeError, DataError, ModelError, OptionError, OutputError
from anysplade.model.encoder import encoder_folder, hidden_states
from anysplade.model.head import find_head, fit_tokenizer, masked_lm_class, missing_weights
from anysplade.model.pooling import native_bfloat16
from anysplade.model.saved import fingerprint, resolve_model
from anysplade.training.callbacks import Estimate, MarkComplete, Progress, last_checkpoint

logger = logging.getLogger(__name__)

_MASKED = 0.2  # of a text's tokens are to be guessed
_NAMED = 0.2  # are to be named as they stand there
_CHARACTERS = 6  # a token, of a text that is cut into pieces: more than there are, so that a piece fills its tokens


@dataclass(frozen=True)
class HeadTraining:
    """What ``train_head`` did; lies in ``head.json`` beside the weights."""

    model: str  # the new masked LM's folder
    encoder: str  # what it was made from
    architecture: str  # class of transformers
    texts: int  # pieces of text trained on
    data_hash: str  # SHA-256 of them
    options: dict[str, Any]
    seconds: float  # of training, in this process
    masked_loss: tuple[float, float]  # of guessing masked tokens: over the first and over the last tenth of the steps
    named_loss: tuple[float, float]  # of naming tokens that can be seen, likewise
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train_head(
    encoder: str,
    text: str,
    output: str | Path,
    *,
    steps: int = 500,
    batch_size: int = 32,
    max_length: int = 128,
    learning_rate: float = 5e-4,
    encoder_learning_rate: float = 1e-4,
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
    """
    output = Path(output).expanduser()
    for name, value, low in (("steps", steps, 1), ("batch_size", batch_size, 1), ("max_length", max_length, 8)):
        if value < low:
            raise OptionError(f"{name} is {value}: it must be at least {low}")
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
    }
    data_hash = hashlib.sha256(json.dumps(pieces).encode()).hexdigest()
    about = {"encoder": encoder, "fingerprint": fingerprint(source), "data_hash": data_hash, "options": options}
    parts = output.with_name(f"{output.name}.parts")  # checkpoints, until the folder is whole
    finished = _claim(output, parts, about)
    if finished is not None:
        logger.info("%s holds this head already", output)
        return finished
    write_whole(parts / "about.json", json.dumps(about, indent=2) + "\n")
    set_seed(seed)
    model, tokenizer = with_new_head(source, folder)
    start_biases(model, tokenizer, pieces, max_length)
    trainer = _HeadTrainer(
        model=model,
        args=_arguments(parts, options, checkpoint_steps),
        train_dataset=pieces,  # a sequence with a length is all the trainer needs
        data_collator=_Collator(tokenizer, min(max_length, tokenizer.model_max_length)),
        callbacks=[MarkComplete(), Progress(progress), Estimate()],
        tokenizer=tokenizer,
        encoder_learning_rate=encoder_learning_rate,
        layer_decay=layer_decay,
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(parts)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    masked, named = (_first_and_last(trainer.state.log_history, name) for name in ("masked_loss", "named_loss"))
    result = HeadTraining(
        model=str(output),
        encoder=encoder,
        architecture=type(model).__name__,
        texts=len(pieces),
        data_hash=data_hash,
        options=options,
        seconds=time.perf_counter() - start,
        masked_loss=masked,
        named_loss=named,
        provenance=provenance(),
    )
    if not all(map(torch.isfinite, map(torch.tensor, (*masked, *named)))):
        raise AnyspladeError(f"{output}: the training diverged (loss {masked[1]:g}); lower `learning_rate`")
    with whole_folder(output) as whole:
        model.eval().save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        write_whole(whole / "head.json", json.dumps(about | result.to_dict(), indent=2) + "\n")
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
        ModelError: the tokenizer is not the encoder's or has no mask token, or the decoder is not tied.
    """
    missing = set(missing_weights(masked_lm_class(source, folder), source, folder))
    options: dict[str, Any] = {"subfolder": folder, "trust_remote_code": False}
    model = AutoModelForMaskedLM.from_pretrained(source, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    fit_tokenizer(tokenizer, model, source)
    if tokenizer.mask_token_id is None:
        raise ModelError(f"{source}: its tokenizer has no mask token, so a head cannot be trained on its text; use another encoder")
    if find_head(model).decoder.weight is not model.get_input_embeddings().weight:
        raise ModelError(f"{source}: {type(model).__name__} does not tie its decoder to the input embeddings; use another encoder")
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key in missing and weight.dim() == 2 and weight.shape[0] == weight.shape[1]:
                weight.copy_(torch.eye(len(weight)))
    return model, tokenizer


@torch.no_grad()
def start_biases(model: PreTrainedModel, tokenizer: Any, pieces: Sequence[str], max_length: int) -> None:
    """Set the decoder's bias to the logarithm of each token's frequency in a sample, less the mean: what a head learns first."""
    head = find_head(model)
    counts = torch.ones(head.decoder.weight.shape[0])
    for ids in tokenizer(list(pieces[:2000]), truncation=True, max_length=max_length)["input_ids"]:
        counts.index_add_(0, torch.tensor(ids), torch.ones(len(ids)))
    frequency = counts.log()
    for bias in head.biases:
        bias.copy_((frequency - frequency.mean()).reshape(bias.shape))


# --------------------------------------------------------------------------------------- training


class _Collator:
    """Texts to padded tokens."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        found = self.tokenizer(texts, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}


class _HeadTrainer(Trainer):
    """Masked tokens are to be guessed, others to be named; both are drawn anew in each step."""

    def __init__(self, tokenizer: Any, encoder_learning_rate: float, layer_decay: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.special = torch.tensor(tokenizer.all_special_ids)  # neither masked nor named
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
        super().log(logs | {name: sum(values) / len(values) for name, values in self.parts.items()}, *args, **kwargs)
        self.parts.clear()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        words = attention.bool() & ~torch.isin(ids, self.special.to(ids.device))
        draw, how = torch.rand(ids.shape, device=ids.device), torch.rand(ids.shape, device=ids.device)
        guessed = words & (draw < _MASKED)
        named = words & (draw >= 1 - _NAMED)
        decoder = find_head(model).decoder
        seen = ids.masked_fill(guessed & (how < 0.8), self.mask_token)
        seen = torch.where(guessed & (how >= 0.9), torch.randint_like(ids, decoder.weight.shape[0]), seen)
        hidden = hidden_states(model, input_ids=seen, attention_mask=attention)
        loss = hidden.new_zeros(())
        for name, chosen in (("masked_loss", guessed), ("named_loss", named)):
            total = nn.functional.cross_entropy(decoder(hidden[chosen]).float(), ids[chosen], reduction="sum")
            part = total / max(1, int(chosen.sum()))
            self.parts.setdefault(name, []).append(float(part.detach()))
            loss = loss + part
        return loss


_LAYER = re.compile(r"\.(?:layers?|blocks?|h)\.(\d+)\.")


def layer_rates(model: PreTrainedModel, top: float, decay: float) -> dict[str, float]:
    """The learning rate of each of the encoder's weights, by name: ``top`` in the top layer, lower by ``decay`` in each below it.

    What is in no layer, embeddings above all, counts as one more layer below; only a norm after the last layer as the top one.
    """
    prefix = f"{model.base_model_prefix}."
    body = {name: _LAYER.search(name) for name, _ in model.named_parameters() if name.startswith(prefix)}
    layers = 1 + max((int(found[1]) for found in body.values() if found), default=-1)
    return {name: top * decay ** (layers - 1 - int(found[1]) if found else layers) for name, found in body.items()}


def _arguments(folder: Path, options: dict[str, Any], checkpoint_steps: int) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    return TrainingArguments(
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


def sample_pieces(text: str, count: int, characters: int, seed: int) -> list[str]:
    """Up to ``count`` pieces of the texts of a source, drawn at random in one pass; memory is that of the pieces.

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
    return kept


def _pieces(text: str, characters: int) -> Iterator[str]:
    text = " ".join(text.split())
    while text:
        end = len(text) if len(text) <= characters else text.rfind(" ", characters // 2, characters) + 1 or characters
        yield text[:end].strip()
        text = text[end:]


def _first_and_last(log: list[dict[str, float]], name: str) -> tuple[float, float]:
    """Mean over the first and over the last tenth of what was logged."""
    values = [entry[name] for entry in log if name in entry]
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def _claim(output: Path, parts: Path, about: dict[str, Any]) -> HeadTraining | None:
    """Check that the output is new or of this very training; its record if it is finished."""
    known = output / "head.json" if (output / "head.json").is_file() else parts / "about.json"
    if not known.is_file():
        require_empty(output)
        return None
    before = json.loads(known.read_text(encoding="utf-8"))
    if {name: before.get(name) for name in about} != about:
        raise OutputError(f"{output}: was made from another encoder, text or options; choose another `output` or remove it")
    if known.parent == parts:
        return None
    return HeadTraining(**{field.name: before[field.name] for field in fields(HeadTraining)})
