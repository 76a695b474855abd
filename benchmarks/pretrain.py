"""Pretrain the bundled backbones: ``python benchmarks/pretrain.py --out DIR``.

Both architectures have the same kind of vocabulary (uncased WordPiece), so that a difference between the two does not come from
the vocabulary. ``--architectures`` makes two more for experiments: DistilBERT, wider and deeper, and RoBERTa, narrower and deeper,
with a larger, cased vocabulary of byte-level BPE. ``--size small`` makes BERT and ModernBERT a third wider and twice as deep.
``--size medium`` is for BERT, ModernBERT and RoBERTa: 8 to 9 million parameters with ``--tokens 16384``. ``--vocabulary`` gives
each a cased vocabulary (byte-level BPE) or an uncased one (WordPiece), so that twins differ only in that. ``--move`` gives a cased
backbone the uncased vocabulary: each new term begins as the mean of the old tokens that it was written with. An interrupted
pretraining resumes from its last checkpoint.

The text is every docstring of the environment's packages. For the modules that the python-docs collection holds out, it lacks the
summary lines, which are the queries. README.md has times and final losses. ``--text FILE`` reads other text, one passage per line.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    set_seed,
)

from anysplade.data.python_docs import read_docstrings

VOCABULARY = 8192
BPE_VOCABULARY = 12_288
SIZES = {"tiny": (192, 2, 3), "small": (256, 4, 4), "medium": (256, 6, 4)}  # width, layers, attention heads
LENGTH = 128  # tokens per training sequence
SHORTEST = 6  # tokens of a sequence
CHECKPOINT = 250  # steps between checkpoints
MASKED = 0.2  # share of tokens to predict
ARCHITECTURES = ("bert", "modernbert", "distilbert", "roberta")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, CLS, SEP, MASK = 0, 2, 3, 4  # ids of special tokens


def train_tokenizer(texts: list[str], kind: str, size: int) -> PreTrainedTokenizerFast:
    shared: dict[str, Any] = {"vocab_size": size, "special_tokens": SPECIAL, "show_progress": False}
    trainer: Any
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **shared)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(limit_alphabet=256, **shared)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **names)


def build(architecture: str, size: str, tokens: int) -> PreTrainedModel:
    """The architecture with random weights."""
    width, layers, heads = SIZES[size]
    if architecture == "roberta" and size != "medium":
        width, layers, heads = 128, 4, 2
    shared: dict[str, Any] = {"vocab_size": tokens, "max_position_embeddings": 256}
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ids = {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP}
    if architecture == "distilbert":
        dropout = {"dropout": 0.0, "attention_dropout": 0.0}
        return DistilBertForMaskedLM(DistilBertConfig(dim=256, n_layers=3, n_heads=4, hidden_dim=768, **shared, **dropout))
    if architecture == "roberta":
        shared["max_position_embeddings"] += 2  # positions begin after the id of the padding
        return RobertaForMaskedLM(RobertaConfig(intermediate_size=4 * width, **shared, **sizes, **ids, **without_dropout))
    if architecture == "bert":
        return BertForMaskedLM(BertConfig(intermediate_size=4 * width, **shared, **sizes, **without_dropout))
    ids |= {"cls_token_id": CLS, "sep_token_id": SEP}
    return ModernBertForMaskedLM(ModernBertConfig(intermediate_size=2 * width, **shared, **sizes, **ids))


def masked_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Apply the MLM head to the masked tokens: (masked, width) → (masked, vocabulary)."""
    if isinstance(model, BertForMaskedLM):
        return model.cls(hidden)
    if isinstance(model, RobertaForMaskedLM):
        return model.lm_head(hidden)
    if isinstance(model, DistilBertForMaskedLM):
        return model.vocab_projector(model.vocab_layer_norm(model.activation(model.vocab_transform(hidden))))
    modern: Any = model
    return modern.decoder(modern.head(hidden))


@torch.no_grad()
def moved(folder: Path, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A backbone with another vocabulary: the row of a term is the mean of the rows of its tokens in the old vocabulary.

    Special tokens have the same ids in both. The old vocabulary marks the space before a word, the new one marks the pieces.
    """
    model, old = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(SPECIAL), len(tokenizer))))
    texts = [token.removeprefix("##") if token.startswith("##") else f" {token}" for token in tokens]
    written = [[i] for i in range(len(SPECIAL))] + old(texts, add_special_tokens=False)["input_ids"]
    rows, bias = model.get_input_embeddings().weight.clone(), model.get_output_embeddings().bias.clone()
    model.resize_token_embeddings(len(tokenizer))
    for term, ids in enumerate(written):
        model.get_input_embeddings().weight[term] = rows[ids].mean(dim=0)
        model.get_output_embeddings().bias[term] = bias[ids].mean()
    return model


def batches(sequences: list[list[int]], size: int, generator: random.Random) -> list[list[list[int]]]:
    """Shuffled batches of sequences of similar length, to avoid padding."""
    order = generator.sample(range(len(sequences)), len(sequences))
    pools = [sorted(order[i : i + 50 * size], key=lambda j: len(sequences[j])) for i in range(0, len(order), 50 * size)]
    made = [[sequences[j] for j in pool[i : i + size]] for pool in pools for i in range(0, len(pool), size)]
    generator.shuffle(made)
    return made


def pretrain(
    architecture: str, texts: list[str], tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, checkpoint: Path
) -> tuple[PreTrainedModel, dict[str, Any]]:
    set_seed(args.seed)
    start = args.start and args.start / name(architecture, args)
    if args.move:
        start = args.move / f"{architecture}-{args.size}-cased"
        model = moved(start, tokenizer)
    else:
        model = AutoModelForMaskedLM.from_pretrained(start) if start else build(architecture, args.size, len(tokenizer))
    model.train()
    sequences = [
        [CLS, *ids[i : i + LENGTH - 2], SEP]
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for i in range(0, len(ids), LENGTH - 2)
        if len(ids) - i >= SHORTEST
    ]
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.02, (args.steps - step) / (args.steps - warmup)))
    )
    generator = random.Random(args.seed)
    losses: list[float] = []
    queue: list[list[list[int]]] = []
    epochs, first, before = 0, 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.setstate(state["generator"])
        torch.set_rng_state(state["torch"])
        losses, queue, epochs, before = state["losses"], state["queue"], state["epochs"], state["seconds"]
        first = len(losses)
    begin = time.perf_counter() - before
    bar = tqdm(range(first, args.steps), desc=architecture, mininterval=10)
    for step in bar:
        if step > first and step % CHECKPOINT == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            state |= {"generator": generator.getstate(), "torch": torch.get_rng_state(), "losses": losses, "queue": queue}
            partial = checkpoint.with_suffix(".new")
            torch.save(state | {"epochs": epochs, "seconds": time.perf_counter() - begin}, partial)
            partial.replace(checkpoint)
        if not queue:
            queue = batches(sequences, args.batch_size, generator)
            epochs += 1
        batch = queue.pop()
        longest = max(map(len, batch))
        ids = torch.tensor([s + [PAD] * (longest - len(s)) for s in batch])  # (batch, length)
        attention = ids != PAD
        chosen = (torch.rand(ids.shape) < MASKED) & (ids >= len(SPECIAL))
        action = torch.rand(ids.shape)
        inputs = ids.masked_fill(chosen & (action < 0.8), MASK)  # 80 % masked, 10 % replaced by another token, 10 % unchanged
        inputs = torch.where(chosen & (action >= 0.9), torch.randint(len(SPECIAL), len(tokenizer), ids.shape), inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bfloat16"):
            hidden = model.base_model(input_ids=inputs, attention_mask=attention.long()).last_hidden_state
            logits = masked_logits(model, hidden[chosen])
        loss = nn.functional.cross_entropy(logits.float(), ids[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.3f}", refresh=False)
    final = sum(losses[-200:]) / len(losses[-200:])
    return model, {
        "architecture": architecture,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sequences": len(sequences),
        "started_from": start and json.loads((start / "pretraining.json").read_text()),
        "steps": args.steps,
        "learning_rate": args.learning_rate,
        "batch_size": args.batch_size,
        "epochs": round(args.steps * args.batch_size / len(sequences), 2),
        "final_loss": round(final, 4),
        "perplexity": round(math.exp(final), 1),
        "seconds": round(time.perf_counter() - begin),
        "precision": args.precision,
        "torch_threads": torch.get_num_threads(),
        "seed": args.seed,
    }


def name(architecture: str, args: argparse.Namespace) -> str:
    """Name of a backbone's folder."""
    kind = {"bpe": "-cased", "wordpiece": "-uncased", None: ""}[args.vocabulary]
    return f"{architecture}-{args.size}{'-moved' if args.move else kind}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--architectures", nargs="+", default=["bert", "modernbert"], choices=ARCHITECTURES)
    parser.add_argument("--size", default="tiny", choices=SIZES, help="for bert and modernbert; medium also for roberta")
    parser.add_argument("--vocabulary", choices=("bpe", "wordpiece"), help="cased or uncased; by default bpe only for roberta")
    parser.add_argument("--tokens", type=int, help=f"size of the vocabulary; by default {VOCABULARY:,}, for bpe {BPE_VOCABULARY:,}")
    parser.add_argument("--text", type=Path, help="text to pretrain on, one passage per line; by default the docstrings")
    parser.add_argument("--start", type=Path, help="start from the backbones in this folder, with their tokenizers")
    parser.add_argument("--move", type=Path, help="folder of cased backbones that get an uncased vocabulary")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"), help="of matrix products")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.text:
        texts = sorted(set(filter(None, map(str.strip, args.text.read_text(encoding="utf-8").splitlines()))))
    else:
        texts = sorted({d.text.partition("\n")[2].strip() if d.held_out else d.text for d in read_docstrings(progress=True)})
    print(f"{len(texts):,} texts, {sum(map(len, texts)) / 1e6:.1f} million characters", flush=True)
    for architecture in args.architectures:
        folder = args.out / name(architecture, args)
        if args.start:
            tokenizer: Any = AutoTokenizer.from_pretrained(args.start / name(architecture, args))
        else:
            kind = args.vocabulary or ("bpe" if architecture == "roberta" else "wordpiece")
            tokenizer = train_tokenizer(texts, kind, args.tokens or (BPE_VOCABULARY if kind == "bpe" else VOCABULARY))
        args.out.mkdir(parents=True, exist_ok=True)
        checkpoint = folder.with_suffix(".checkpoint")
        model, record = pretrain(architecture, texts, tokenizer, args, checkpoint)
        model = model.half()  # stored in 16 bits to stay small; the config says float32, so it is loaded as float32
        model.config.dtype = torch.float32
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = "float32"
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(folder)
        (folder / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
        checkpoint.unlink(missing_ok=True)
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
