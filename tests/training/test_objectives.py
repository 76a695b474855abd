"""Each objective against sentence-transformers run by hand: the same losses, the same weights."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sparse_encoder import losses
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling

from anysplade import DataError, OptionError, Pair, TrainingConfig, train
from anysplade.training.config import parse_objective
from anysplade.training.objectives import check_examples
from tiny import WORDS

STEPS = 20
OPTIONS = {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-3, "k": 1, "shift": 0, "checkpoint_steps": 100}


def write_examples(path, negatives=0, scores=0):
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(64):
        words = generator.choice(WORDS, 40)
        row = {"query": " ".join(words[:3]), "positive": " ".join(words[1:10])}
        row |= {f"negative_{j}": " ".join(words[10 + 5 * j : 18 + 5 * j]) for j in range(1, negatives + 1)}
        if scores:
            row["scores"] = [round(float(value), 3) for value in generator.normal(8, 4, scores)]
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def by_hand(backbone, rows, ranking, folder, *, pooling=("max", "relu"), queries=None, cached=None, prompts=None, accumulate=1):
    """Losses of the ranking alone, a batch each, and the final weights; all parts are sentence-transformers' own."""
    torch.manual_seed(0)
    document = [Transformer(backbone, transformer_task="fill-mask"), SpladePooling(pooling[0], activation_function=pooling[1])]
    route = None
    if queries is None:
        encoder = SparseEncoder(modules=document, similarity_fn_name="dot")
    else:
        tokenizer = document[0].tokenizer
        static = SparseStaticEmbedding(tokenizer, torch.tensor(idf(rows, tokenizer)), frozen=queries == "idf")
        encoder = SparseEncoder(modules=[Router.for_query_document([static], document)], similarity_fn_name="dot")
        route = {"query": "query", "positive": "document"}
    columns = {("label" if name == "scores" else name): [row[name] for row in rows] for name in rows[0]}
    loss = ranking(encoder)
    seen = []
    compute = loss.compute_loss_from_embeddings

    def watched(embeddings, labels=None):
        value = compute(embeddings, labels)
        seen.append(float(sum(value.values()) if isinstance(value, dict) else value))
        return value

    loss.compute_loss_from_embeddings = watched
    options = {"document_regularizer_weight": 1e-3, "query_regularizer_weight": None if queries else 1e-3}
    if cached is None:
        splade = losses.SpladeLoss(encoder, loss, **options)
    else:
        splade = losses.CachedSpladeLoss(encoder, loss, mini_batch_size=cached, **options)
    contrastive = isinstance(loss, losses.SparseMultipleNegativesRankingLoss)
    arguments = SparseEncoderTrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=8, learning_rate=1e-3, warmup_steps=0.1, seed=0, data_seed=0,
        batch_sampler=BatchSamplers.NO_DUPLICATES if contrastive else BatchSamplers.BATCH_SAMPLER, save_strategy="no",
        report_to="none", disable_tqdm=True, router_mapping=route, prompts=prompts, gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    SparseEncoderTrainer(encoder, arguments, Dataset.from_dict(columns), loss=splade).train()
    return seen[::accumulate], encoder.state_dict()


def idf(rows, tokenizer):
    frequency = np.zeros(len(tokenizer), np.float32)
    for row in rows:
        frequency[list(set(tokenizer(row["positive"], add_special_tokens=False)["input_ids"]))] += 1
    weights = np.log1p((len(rows) - frequency + 0.5) / (frequency + 0.5))
    weights[tokenizer.all_special_ids] = 0
    return weights


class KLAndMargin(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.kl = losses.SparseDistillKLDivLoss(encoder, temperature=2.0)
        self.margin = losses.SparseMarginMSELoss(encoder)

    def compute_loss_from_embeddings(self, embeddings, labels):
        return {
            "kl": self.kl.compute_loss_from_embeddings(embeddings, labels),
            "margin": 0.05 * self.margin.compute_loss_from_embeddings(embeddings, labels),
        }


def contrastive(encoder):
    return losses.SparseMultipleNegativesRankingLoss(encoder)


CASES = {
    "in-batch": ({}, (0, 0), contrastive, {}),
    "temperature": ({"temperature": 4.0}, (0, 0), lambda e: losses.SparseMultipleNegativesRankingLoss(e, scale=0.25), {}),
    "hard negative": ({}, (1, 0), contrastive, {}),
    "several hard negatives": ({}, (3, 0), contrastive, {}),
    "margins": ({"objective": "margin-mse"}, (1, 1), losses.SparseMarginMSELoss, {}),
    "margins from scores": ({"objective": "margin-mse"}, (3, 4), losses.SparseMarginMSELoss, {}),
    "kl": ({"objective": "kl", "kl_temperature": 4.0}, (3, 4), lambda e: losses.SparseDistillKLDivLoss(e, temperature=4.0), {}),
    "kl and margins": ({"objective": "kl + 0.05*margin-mse"}, (3, 4), KLAndMargin, {}),
    "cached": ({"mini_batch_size": 3}, (1, 0), contrastive, {"cached": 3}),
    "sum": ({"pooling": "sum"}, (0, 0), contrastive, {"pooling": ("sum", "relu")}),
    "double log": ({"double_log": True}, (0, 0), contrastive, {"pooling": ("max", "log1p_relu")}),
    "idf queries": ({"query_encoder": "idf"}, (0, 0), contrastive, {"queries": "idf"}),
    "static queries": ({"query_encoder": "static"}, (0, 0), contrastive, {"queries": "static"}),
    "prompts": (
        {"query_prompt": "kabel ", "document_prompt": "lodan mifil "},
        (0, 0),
        contrastive,
        {"prompts": {"query": "kabel ", "positive": "lodan mifil "}},
    ),
    "accumulated": ({"gradient_accumulation": 2}, (0, 0), contrastive, {"accumulate": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_parity_with_sentence_transformers(case, backbone, tmp_path):
    options, (negatives, scores), ranking, hand = CASES[case]
    rows = write_examples(tmp_path / "data.jsonl", negatives, scores)
    expected, weights = by_hand(backbone, rows, ranking, tmp_path / "hand", **hand)
    assert len(expected) == STEPS
    for fused, tolerance in ((False, 1e-4), (True, 1e-3)):
        run = tmp_path / f"fused-{fused}"
        result = train(TrainingConfig(backbone, str(tmp_path / "data.jsonl"), output=str(run), fused=fused, **OPTIONS, **options))
        losses_seen = [seen["loss"] for seen in result.monitoring["observations"]]
        np.testing.assert_allclose(losses_seen, expected, rtol=tolerance, atol=tolerance)
        trained = SparseEncoder(str(run / "model")).state_dict()
        assert trained.keys() == weights.keys()
        for name in weights:
            if name.endswith("key.bias"):
                continue  # softmax ignores it, so its gradient is rounding alone, which Adam makes whole steps of
            torch.testing.assert_close(
                trained[name], weights[name], rtol=0, atol=10 * tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_inference_free_queries_are_stock_on_disk(backbone, tmp_path):
    write_examples(tmp_path / "data.jsonl")
    train(TrainingConfig(backbone, str(tmp_path / "data.jsonl"), output=str(tmp_path / "run"), query_encoder="idf", **OPTIONS))
    encoder = SparseEncoder(str(tmp_path / "run" / "model"))
    query = encoder.encode_query(" ".join(WORDS[:3])).to_dense()
    assert int((query > 0).sum()) == 3
    document = encoder.encode_document(" ".join(WORDS[:3])).to_dense()
    assert query.shape == document.shape


@pytest.mark.parametrize("query_encoder", ["mlm", "idf", "static"])
def test_a_trained_model_is_trained_on(query_encoder, backbone, tmp_path):
    write_examples(tmp_path / "data.jsonl")
    options = {"query_encoder": query_encoder, "query_prompt": "kabel "}
    train(TrainingConfig(backbone, str(tmp_path / "data.jsonl"), output=str(tmp_path / "first"), **OPTIONS, **options))
    model = str(tmp_path / "first" / "model")
    result = train(TrainingConfig(model, str(tmp_path / "data.jsonl"), output=str(tmp_path / "second"), **OPTIONS))
    assert result.steps == STEPS
    assert (result.calibration["k"], result.calibration["shift"]) == (1, 0)
    first, second = SparseEncoder(model), SparseEncoder(result.model)
    assert second.prompts == first.prompts == {"query": "kabel ", "document": ""}
    before, after = first.state_dict(), second.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("embeddings" in name for name in changed)
    assert any("sub_modules.query" in name for name in changed) == (query_encoder == "static")
    if query_encoder != "mlm":
        wanted = TrainingConfig(
            model, str(tmp_path / "data.jsonl"), output=str(tmp_path / "third"), query_active_dims=5.0, **OPTIONS
        )
        with pytest.raises(OptionError, match="a query's terms are its tokens"):
            train(wanted)


def test_prompts_stay_with_the_model(backbone, tmp_path):
    write_examples(tmp_path / "data.jsonl")
    config = TrainingConfig(backbone, str(tmp_path / "data.jsonl"), output=str(tmp_path / "run"), query_prompt="kabel ", **OPTIONS)
    train(config)
    assert SparseEncoder(str(tmp_path / "run" / "model")).prompts == {"query": "kabel ", "document": ""}


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"attention": "eager"}, {"precision": "bfloat16"}])
def test_other_ways_to_compute_the_same(options, backbone, tmp_path):
    write_examples(tmp_path / "data.jsonl")
    plain = TrainingConfig(backbone, str(tmp_path / "data.jsonl"), output=str(tmp_path / "plain"), **OPTIONS)
    other = TrainingConfig(backbone, str(tmp_path / "data.jsonl"), output=str(tmp_path / "other"), **OPTIONS, **options)
    a, b = ([seen["loss"] for seen in train(config).monitoring["observations"]] for config in (plain, other))
    tolerance = 0.05 if "precision" in options else 1e-3
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_an_attention_that_is_not_there(backbone, tmp_path):
    write_examples(tmp_path / "data.jsonl")
    config = TrainingConfig(backbone, str(tmp_path / "data.jsonl"), output=str(tmp_path / "run"), attention="flash_attention_2")
    with pytest.raises(OptionError, match="attention 'flash_attention_2'"):
        train(config)


def test_objective_formulas():
    assert parse_objective("contrastive") == {"contrastive": 1.0}
    assert parse_objective("kl + 0.05*margin-mse") == {"kl": 1.0, "margin-mse": 0.05}
    for wrong in ("", "mse", "kl+kl", "2*", "kl ++ margin-mse"):
        with pytest.raises(OptionError, match="objective"):
            parse_objective(wrong)


def config(objective, **options):
    return TrainingConfig("b", "data.jsonl", output="o", objective=objective, **options)


@pytest.mark.parametrize(
    "objective, pair, message",
    [
        ("kl", Pair("q", "p"), "no negatives, which kl needs"),
        ("margin-mse", Pair("q", "p", ("n",)), "no scores, which margin-mse learns from"),
        ("kl", Pair("q", "p", ("n",), (3.0,)), "kl needs the positive's score too"),
    ],
)
def test_examples_that_do_not_fit_the_objective(objective, pair, message):
    with pytest.raises(DataError, match=message):
        check_examples(config(objective), [pair])


@pytest.mark.parametrize(
    "objective, scores, message",
    [
        ("margin-mse", (0.9, 0.1), r"margins are in [0.8, 0.8], and MarginMSE needs margins of raw scores"),
        ("margin-mse", (-0.8,), r"margins are in [-0.8, -0.8]"),
        # The temperature is 2, and so the share of the first of two choices 1 / (1 + exp(-difference / 2)).
        (
            "kl",
            (0.9, 0.85),
            "as good as undecided (its first choice gets 50.6 %); the standard deviation of an example's scores is 0.025",
        ),
        ("kl", (0.85, 0.9), "gets 50.6 %"),
        (
            "kl",
            (90.0, 10.0),
            "sure of one document (its first choice gets 100.0 %); the standard deviation of an example's scores is 40",
        ),
        ("margin-mse", (12.0, 3.0), None),
        ("margin-mse", (12.0,), None),
        ("kl", (4.0, 2.0), None),
        ("kl", (0.0, 0.22), None),  # 52.7 %, which is 5.5 % of the way from guessing to being sure
        ("kl", (0.0, 0.18), "gets 52.2 %"),  # 4.5 %
        ("kl", (0.0, 13.0), None),  # 99.85 %
        ("kl", (0.0, 14.0), "sure of one document"),  # 99.91 %
    ],
)
def test_teacher_scores_that_do_not_fit(objective, scores, message, caplog):
    check_examples(config(objective), [Pair("q", "p", ("n",), scores)] * 3)
    assert (message in caplog.text) if message else not caplog.text


def test_one_wide_margin_is_enough(caplog):
    check_examples(config("margin-mse"), [Pair("q", "p", ("n",), (margin,)) for margin in (0.5, 9.0, 0.1)])
    assert not caplog.text
