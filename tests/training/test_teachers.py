"""A teacher's scores against matrices written out by hand, and its vectors against the model's own."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss

from anysplade import DataError, ModelError, OptionError, OutputError, Pair, TrainingConfig, load_encoder, load_pairs, mine, train
from anysplade.training import mining
from anysplade.training.objectives import TaughtContrastiveLoss, TeacherLoss
from anysplade.training.teacher_cache import VectorCache
from anysplade.training.teacher_scores import prepare_teacher
from anysplade.training.teachers import open_teacher
from tiny import WORDS, make_tokenizer

PAIRS = [
    Pair(" ".join(WORDS[i : i + 3]), " ".join(WORDS[i + 1 : i + 9]), (" ".join(WORDS[i + 9 : i + 15]),)) for i in range(0, 96, 4)
]


def by_hand(folder, kind, pairs):
    """The teacher's scores of a batch by sentence-transformers alone, (queries, documents)."""
    documents = [pair.positive for pair in pairs] + [pair.negatives[0] for pair in pairs]
    if kind == "cross-encoder":
        model = open_teacher(folder).model
        scores = np.full((len(pairs), len(documents)), np.nan)
        for i, pair in enumerate(pairs):
            for column, text in ((i, pair.positive), (len(pairs) + i, pair.negatives[0])):
                scores[i, column] = model.predict([(pair.query, text)], activation_fn=torch.nn.Identity())[0]
        return scores
    model = SparseEncoder(folder) if kind == "sparse" else SentenceTransformer(folder)
    left, right = (
        encode(texts) for encode, texts in ((model.encode_query, [p.query for p in pairs]), (model.encode_document, documents))
    )
    return np.asarray(model.similarity(left, right))


@pytest.mark.parametrize("kind", ["dense", "sparse", "cross-encoder"])
def test_the_scores_of_a_batch_are_the_models_own(kind, teachers, tmp_path):
    assert open_teacher(teachers[kind]).kind == kind
    teacher = prepare_teacher(teachers[kind], PAIRS, tmp_path / "teacher", max_length=None, precision="float32")
    batch = np.array([7, 2, 19, 4])
    found = teacher.scores(batch[:2], batch)
    expected = by_hand(teachers[kind], kind, [PAIRS[i] for i in batch])[:2]
    assert found.shape == (2, 8)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, atol=2e-3 if kind == "dense" else 1e-4)  # half precision keeps 11 bits


@pytest.fixture
def batch(teachers, tmp_path):
    """Vectors of a batch of 6 and their examples' numbers, with the teacher of all examples."""
    generator = torch.Generator().manual_seed(0)
    embeddings = [torch.rand(6, 50, generator=generator).requires_grad_() for _ in range(3)]
    numbers = torch.tensor([3, 1, 20, 8, 15, 4])

    def of(kind):
        return prepare_teacher(teachers[kind], PAIRS, tmp_path / kind, max_length=None, precision="float32")

    return embeddings, numbers, of


@pytest.mark.parametrize("kind", ["dense", "sparse", "cross-encoder"])
def test_kl_over_the_batch_is_that_of_a_dense_matrix(kind, batch):
    embeddings, numbers, of = batch
    teacher = of(kind)
    loss = TeacherLoss(teacher, 2.0, 0.5).compute_loss_from_embeddings(embeddings, numbers)
    gradients = torch.autograd.grad(loss, embeddings)
    wanted = torch.from_numpy(teacher.scores(numbers.numpy(), numbers.numpy()))
    total = 0.0
    scores = embeddings[0] @ torch.cat(embeddings[1:]).T / 2
    for i in range(6):
        known = [j for j in range(12) if not torch.isnan(wanted[i, j])]
        assert len(known) == (2 if kind == "cross-encoder" else 12)
        p, q = (torch.softmax(row[known], 0) for row in (wanted[i] / 0.5, scores[i]))
        total = total + sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True)) / 6
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for found, expected in zip(gradients, torch.autograd.grad(total, embeddings), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["dense", "sparse", "cross-encoder"])
def test_documents_that_the_teacher_prefers_are_no_negatives(kind, batch, backbone):
    embeddings, numbers, of = batch
    encoder, teacher = load_encoder(backbone), of(kind)
    loss = TaughtContrastiveLoss(encoder, teacher, scale=0.5).compute_loss_from_embeddings(embeddings, numbers)
    given = teacher.scores(numbers.numpy(), numbers.numpy())
    scores = 0.5 * embeddings[0] @ torch.cat(embeddings[1:]).T
    left_out, total = 0, 0.0
    for i in range(6):
        kept = [j for j in range(12) if not given[i, j] > given[i, i]]
        left_out += 12 - len(kept)
        total = total - (scores[i, i] - torch.logsumexp(scores[i, kept], 0)) / 6
    assert left_out > 0
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)


def test_without_a_likely_answer_the_loss_is_the_stock_one(batch, backbone):
    class Undecided:
        def scores(self, queries, documents):
            return np.zeros((len(queries), 2 * len(documents)), np.float32)

    embeddings, numbers, _ = batch
    encoder = load_encoder(backbone)
    stock = SparseMultipleNegativesRankingLoss(encoder, scale=0.5).compute_loss_from_embeddings(embeddings, numbers)
    assert torch.equal(
        TaughtContrastiveLoss(encoder, Undecided(), scale=0.5).compute_loss_from_embeddings(embeddings, numbers), stock
    )


@pytest.mark.parametrize("kind", ["dense", "sparse", "cross-encoder"])
@pytest.mark.parametrize("objective", ["auto", "teacher", "contrastive + 0.5*teacher"])
def test_a_run_with_a_teacher(kind, objective, teachers, backbone, collection_folder, tmp_path):
    data = str(collection_folder)
    if kind == "cross-encoder":  # with random weights it tells no negative from a positive
        mine(data, tmp_path / "mined.jsonl", negatives=2, margin=0)
        data = str(tmp_path / "mined.jsonl")
    config = TrainingConfig(
        backbone, data, output=str(tmp_path / "run"), teacher=teachers[kind], objective=objective,
        steps=3, batch_size=4, max_length=16,
    )  # fmt: skip
    result = train(config)
    assert result.steps == 3
    names = {"teacher_loss"} | ({"contrastive_loss"} if objective != "teacher" else set())
    logged = result.log[0].keys()
    assert (names <= logged) if len(names) > 1 else "base_loss" in logged
    assert result.config["objective"] == ("contrastive + teacher" if objective == "auto" else objective)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["hashes"]["teacher"]
    assert not (tmp_path / "run" / "data").exists()
    assert f"| Teacher | `{teachers[kind]}` |" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert train(config) == result


def test_examples_without_negatives_get_hard_ones(teachers, backbone, collection_folder, tmp_path, monkeypatch):
    seen = {}
    module = "anysplade.training.inputs.prepare_teacher"

    def watch(name, pairs, folder, **options):
        seen["pairs"] = list(pairs)
        return prepare_teacher(name, pairs, folder, **options)

    monkeypatch.setattr(module, watch)
    options = {"teacher": teachers["sparse"], "steps": 2, "batch_size": 4, "max_length": 16}
    train(TrainingConfig(backbone, str(collection_folder), output=str(tmp_path / "run"), **options))
    assert {len(pair.negatives) for pair in seen["pairs"]} == {2}
    assert len(list((Path(os.environ["ANYSPLADE_CACHE"]) / "teachers").iterdir())) == 1  # mining and training ask for the same
    train(TrainingConfig(backbone, str(collection_folder), output=str(tmp_path / "none"), negatives=0, **options))
    assert {len(pair.negatives) for pair in seen["pairs"]} == {0}


def test_so_many_negatives_are_mined_as_are_asked_for(teachers, backbone, collection_folder, tmp_path):
    options = {"teacher": teachers["sparse"], "steps": 2, "batch_size": 4, "max_length": 16, "output": str(tmp_path / "run")}
    one = train(TrainingConfig(backbone, str(collection_folder), negatives=1, **options))
    assert one.pairs > 4
    mine(str(collection_folder), tmp_path / "mined.jsonl", negatives=1)
    with pytest.raises(DataError, match="negatives, but `negatives` is 3"):  # of examples that have some, none are mined
        train(TrainingConfig(backbone, str(tmp_path / "mined.jsonl"), negatives=3, **options | {"output": str(tmp_path / "a")}))


def test_what_a_call_prepared_serves_no_other_one(teachers, backbone, collection_folder, tmp_path, monkeypatch):
    """A call that ends before the first step holds no run, and the next one in its folder may be of anything."""
    options = {"output": str(tmp_path / "run"), "steps": 2, "batch_size": 4, "max_length": 16}
    data = str(collection_folder)
    with monkeypatch.context() as patch:

        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr("anysplade.training.run.start_encoder", stop)
        with pytest.raises(KeyboardInterrupt):
            train(TrainingConfig(backbone, data, teacher=teachers["sparse"], **options))
    assert (tmp_path / "run" / "data" / "teacher").exists()
    seen = {}

    def watch(name, pairs, folder, **given):
        seen["pairs"], seen["teacher"] = list(pairs), prepare_teacher(name, pairs, folder, **given)
        return seen["teacher"]

    monkeypatch.setattr("anysplade.training.inputs.prepare_teacher", watch)
    train(TrainingConfig(backbone, data, teacher=teachers["dense"], **options))
    batch = np.arange(4)
    expected = by_hand(teachers["dense"], "dense", seen["pairs"][:4])
    np.testing.assert_allclose(seen["teacher"].scores(batch, batch)[:, :8], expected, atol=2e-3)
    assert train(TrainingConfig(backbone, data, teacher=teachers["dense"], **options)).pairs == len(seen["pairs"])


def test_what_was_mined_is_known_by_its_content(teachers, backbone, collection_folder, tmp_path, monkeypatch, caplog):
    data, asked, searcher = tmp_path / "pairs.jsonl", [], mining._searcher
    shutil.copy(collection_folder / "pairs.jsonl", data)
    options = {"teacher": teachers["dense"], "steps": 2, "batch_size": 4, "max_length": 16}
    config = TrainingConfig(backbone, str(data), output=str(tmp_path / "run"), **options)
    monkeypatch.setattr(mining, "_searcher", lambda *given: (asked.append(given), searcher(*given))[1])

    def until_the_first_step():
        asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr("anysplade.training.run.start_encoder", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train(config)
        return len(asked)

    assert until_the_first_step() == 2  # bm25 and the teacher
    os.utime(data, (0, 0))
    assert until_the_first_step() == 0
    (mined,) = (tmp_path / "run" / "data").glob("mined-*.jsonl")
    for file in (mined, tmp_path / "run" / "data" / "teacher" / "vectors.npy"):
        file.write_bytes(file.read_bytes()[:-100])
    assert until_the_first_step() == 2
    assert caplog.text.count("damaged; it is made again") == 1
    data.write_text(data.read_text() + '{"query": "kabel", "positive": "kabel lodan"}\n')
    assert until_the_first_step() == 2
    run = tmp_path / "run"
    (run / "run.json").write_text(json.dumps({"config": json.loads(json.dumps(dataclasses.asdict(config))), "calibration": {}}))
    (run / "data" / "teacher" / "vectors.npy").write_bytes(b"")
    assert train(config).steps == 2
    assert "vectors.npy: is missing or damaged; it is made again" in caplog.text


def test_mining_by_several_models_with_a_teacher(teachers, collection_folder, tmp_path):
    options = {"negatives": 3, "margin": 0.0}
    alone = {}
    for name, miner in (("bm25", "bm25"), ("dense", teachers["dense"])):
        mine(str(collection_folder), tmp_path / f"{name}.jsonl", miner=miner, teacher=teachers["sparse"], **options)
        alone[name] = {row["query"]: row["negatives"] for row in map(json.loads, (tmp_path / f"{name}.jsonl").open())}
    mine(str(collection_folder), tmp_path / "both.jsonl", miner=["bm25", teachers["dense"]], teacher=teachers["sparse"], **options)
    judge = VectorCache(open_teacher(teachers["sparse"]), tmp_path / "kept")
    both = load_pairs(tmp_path / "both.jsonl")
    assert both
    for pair in both:
        own, *others = judge.scores([(pair.query, text) for text in (pair.positive, *pair.negatives)])
        assert all(score <= own for score in others)
        known = [alone[name].get(pair.query) for name in alone]
        if all(known):
            assert set(pair.negatives) <= {text for texts in known for text in texts}


def test_faults(teachers, backbone, collection_folder, tmp_path):
    options = {"output": str(tmp_path / "run"), "steps": 2, "batch_size": 4}
    for objective, message in (("teacher", "needs a teacher"), ("contrastive + teacher", "needs a teacher")):
        with pytest.raises(OptionError, match=message):
            TrainingConfig(backbone, "data", objective=objective, **options)
    for objective in ("contrastive", "kl", "teacher + margin-mse"):
        with pytest.raises(OptionError, match="does not go with a teacher model"):
            TrainingConfig(backbone, "data", teacher=teachers["dense"], objective=objective, **options)
    with pytest.raises(ModelError, match="cannot teach"):
        train(TrainingConfig(backbone, str(collection_folder), teacher=teachers["body"], **options))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ModelError, match="not trained to retrieve"):
        open_teacher(backbone)
    with pytest.raises(OptionError, match="bm25 cannot be the teacher"):
        mine(str(collection_folder), tmp_path / "mined.jsonl", teacher="bm25")
    with pytest.raises(ModelError, match="a cross-encoder cannot search"):
        mine(str(collection_folder), tmp_path / "mined.jsonl", miner=teachers["cross-encoder"])
    mine(str(collection_folder), tmp_path / "mined.jsonl", negatives=1)  # the mistake left nothing behind
    with pytest.raises(DataError, match="there are no negatives"):
        train(TrainingConfig(backbone, str(collection_folder), teacher=teachers["cross-encoder"], negatives=0, **options))


def test_another_teacher_is_another_run(teachers, backbone, collection_folder, tmp_path):
    options = {"output": str(tmp_path / "run"), "steps": 2, "batch_size": 4, "max_length": 16}
    train(TrainingConfig(backbone, str(collection_folder), teacher=teachers["dense"], **options))
    with pytest.raises(OutputError, match="teacher"):
        train(TrainingConfig(backbone, str(collection_folder), teacher=teachers["sparse"], **options))


def test_a_teacher_of_nan_is_named(teachers, tmp_path):
    teacher = open_teacher(teachers["dense"])
    teacher.model[0].model.embeddings.word_embeddings.weight.data[7].fill_(float("nan"))
    bad = make_tokenizer().convert_ids_to_tokens(7)
    with pytest.raises(ModelError, match=f"gives NaN or infinity for the document '{bad}'"):
        teacher.encode([WORDS[30], bad], "document")


def test_numbers_that_half_precision_cannot_hold_are_an_error(teachers):
    teacher = open_teacher(teachers["dense"])
    teacher.model.similarity_fn_name = "dot"  # cosines are small
    teacher.model[0].model.encoder.layer[-1].output.LayerNorm.bias.data.fill_(1e5)
    with pytest.raises(ModelError, match="above 65,504"):
        teacher.encode([WORDS[30]], "document")


@pytest.mark.parametrize("max_length", [None, 8, 256])
def test_no_text_is_too_long(max_length, teachers, tmp_path):
    """The models have positions for 64 tokens; a static embedding for any number."""
    tokens = make_tokenizer().backend_tokenizer
    SentenceTransformer(modules=[StaticEmbedding(tokens, embedding_dim=8)]).save_pretrained(str(tmp_path / "static"))
    routed = Router.for_query_document([StaticEmbedding(tokens, embedding_dim=32)], list(SentenceTransformer(teachers["dense"])))
    SentenceTransformer(modules=[routed]).save_pretrained(str(tmp_path / "routed"))
    text = " ".join(WORDS * 2)
    for source in (teachers["dense"], teachers["sparse"], str(tmp_path / "static"), str(tmp_path / "routed")):
        rows = open_teacher(source, max_length=max_length).encode([text, " ".join(WORDS[:20])], "document")
        same = np.allclose(*(rows.toarray() if sparse.issparse(rows) else rows).astype(np.float32), atol=2e-3)
        assert same == (max_length == 8 and "static" not in source)  # both are cut after the same words
    pairs = [(WORDS[0], text), (WORDS[0], " ".join(WORDS[:20]))]
    scores = open_teacher(teachers["cross-encoder"], max_length=max_length).rate(pairs)
    assert (abs(scores[0] - scores[1]) < 1e-7) == (max_length == 8)  # both are cut after the same words
