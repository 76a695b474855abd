import json
import math
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss

from anysplade import load_encoder
from anysplade.training.monitoring import Monitor, Observation, diagnose, observe, renamed_findings
from anysplade.training.observers import ObservedLoss
from anysplade.training.run import TrainingResult, _stored_result


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 6), negatives=st.integers(0, 2), vocabulary=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 999)
)
def test_an_observation_is_what_its_names_say(n, negatives, vocabulary, share, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.rand(n, vocabulary, generator=generator) for _ in range(2 + negatives)]
    columns = [column * (torch.rand(n, vocabulary, generator=generator) < share) for column in columns]
    queries, documents = columns[0], torch.cat(columns[1:])
    seen = observe(columns, torch.tensor(1.5), torch.zeros(vocabulary), step=7, count=0).read()
    assert (seen.step, seen.loss, seen.chance) == (7, 1.5, math.log(len(documents)))
    assert seen.query_active_dims == pytest.approx((queries > 0).sum(1).float().mean().item())
    assert seen.document_active_dims == pytest.approx((documents > 0).sum(1).float().mean().item())
    for name, rows in (("query_similarity", queries), ("document_similarity", documents)):
        cosines = torch.nn.functional.cosine_similarity(rows.unsqueeze(0), rows.unsqueeze(1), dim=2)
        apart = ~torch.eye(len(rows), dtype=torch.bool)
        expected = cosines[apart].mean().item() if len(rows) > 1 else 0
        assert getattr(seen, name) == pytest.approx(expected, abs=1e-5)
    in_both = (queries > 0).float().mean(0) * (documents > 0).float().mean(0)
    assert seen.flops == pytest.approx(in_both.sum().item(), abs=1e-5)
    scores = queries @ documents.T
    assert seen.score_mean == pytest.approx(scores.mean().item(), abs=1e-5)
    assert seen.score_std == pytest.approx(scores.std(correction=0).item(), abs=1e-5)
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[:, :n] = torch.eye(n, dtype=torch.bool)
    if scores.numel() > n:
        assert seen.margin == pytest.approx((scores[right].mean() - scores[~right].mean()).item(), abs=1e-4)
    always = (documents > 0).all(dim=0).sum().item()
    assert seen.always_on_share == pytest.approx(always / max(1.0, seen.document_active_dims))


def test_a_term_is_dead_once_no_document_used_it_for_fifty_observations():
    last_used = torch.zeros(4)
    vectors = torch.tensor([[1.0, 0, 0, 0], [1.0, 2.0, 0, 0]])
    shares = [observe([vectors, vectors], torch.tensor(0.0), last_used, count, count).read().dead_share for count in range(52)]
    assert shares[50] == 0
    assert shares[51] == 0.5


HEALTHY = {
    "step": 0,
    "loss": 1.0,
    "chance": math.log(16),
    "query_active_dims": 30.0,
    "document_active_dims": 120.0,
    "flops": 5.0,
    "query_similarity": 0.3,
    "document_similarity": 0.3,
    "score_mean": 8.0,
    "score_std": 4.0,
    "margin": 9.0,
    "dead_share": 0.5,
    "always_on_share": 0.02,
}


def run(count=20, **odd):
    return [Observation(**HEALTHY | {"step": step} | odd) for step in range(count)]


def test_terms_that_no_text_can_have_are_not_counted():
    monitor = Monitor(8, live=torch.tensor([0, 1, 2, 5]))
    for _ in range(60):
        monitor._due = True
        monitor.see([torch.eye(2, 8), torch.eye(2, 8)], torch.tensor(2.0))
    monitor.state()
    assert monitor.vocabulary == 4
    assert monitor.observations[-1].dead_share == 0.5
    assert monitor.observations[-1].document_active_dims == 1


@pytest.mark.parametrize("steps, observed", [(10, range(10)), (399, range(399)), (1000, range(0, 1000, 5))])
def test_a_run_is_observed_at_most_so_often(steps, observed):
    monitor = Monitor(3)

    class State:
        max_steps, stateful_callbacks = steps, {}

    for State.global_step in range(steps):
        if State.global_step == 0:
            monitor.on_train_begin(None, State, None)
        monitor.on_step_begin(None, State, None)
        monitor.see([torch.eye(2, 3), torch.eye(2, 3)], torch.tensor(1.0))
    monitor.on_train_end(None, State, None)
    assert [seen.step for seen in monitor.observations] == list(observed)


def test_an_observation_is_read_a_step_later_or_when_it_is_stored(caplog):
    """A step does not wait for its own numbers, and what a checkpoint or the log has is the same as if it did."""
    monitor, control = Monitor(3, stop=True), SimpleNamespace(should_training_stop=False)
    state = SimpleNamespace(max_steps=10, global_step=0, stateful_callbacks={})
    monitor.on_train_begin(None, state, control)

    def step(loss):
        monitor.on_step_begin(None, state, control)
        monitor.see([torch.eye(2, 3), torch.eye(2, 3)], torch.tensor(loss))
        state.global_step += 1
        monitor.on_step_end(None, state, control)

    step(1.0)
    assert monitor.observations == []
    step(2.0)
    assert [seen.loss for seen in monitor.observations] == [1.0]
    logs = {}
    monitor.on_log(None, state, control, logs=logs)
    assert logs["monitor/loss"] == 2.0
    step(math.nan)
    assert not monitor.collapsed
    assert [seen["step"] for seen in monitor.state()["observations"]] == [0, 1, 2]
    assert "step 2: divergence" in caplog.text
    assert not control.should_training_stop
    step(math.nan)
    assert control.should_training_stop
    assert len(monitor.findings) == 1


@pytest.mark.parametrize(
    "first, later, found",
    [
        ((0.8, 0.8), (0.5, 0.8), ["queries keep 50% of their own words by idf, 80% at the start"]),
        ((0.8, 0.8), (0.8, 0.5), ["documents keep 50% of their own words by idf, 80% at the start"]),
        ((0.4, 0.4), (0.3, 0.3), []),  # an untrained head that does not know the words
        ((0.8, 0.8), (0.7, 0.7), []),
        ((None, 0.8), (None, 0.5), ["documents keep 50% of their own words by idf, 80% at the start"]),
        ((None, None), (None, None), []),  # a run of an older version
    ],
)
def test_a_run_that_loses_the_words_of_the_text(first, later, found):
    names = ("query_own_words", "document_own_words")
    seen = run(20, **dict(zip(names, later, strict=True)))
    seen[0] = replace(seen[0], **dict(zip(names, first, strict=True)))
    findings = diagnose(seen, vocabulary=1000)
    assert [finding.evidence for finding in findings] == found
    assert all(finding.name == "words lost" and not finding.collapse for finding in findings)


def test_a_dense_head_has_words_by_chance():
    seen = run(20, document_own_words=0.5)
    seen[0] = replace(seen[0], document_own_words=1.0, document_active_dims=900.0)
    assert diagnose(seen, vocabulary=1000) == []


def test_a_healthy_run_has_no_finding():
    assert diagnose(run(), vocabulary=1000) == []


@pytest.mark.parametrize(
    "odd, name, collapse",
    [
        ({"loss": math.nan}, "divergence", True),
        ({"score_mean": math.inf}, "divergence", True),
        ({"gradient_norm": math.nan}, "divergence", True),
        ({"document_active_dims": 0.0}, "all zero", True),
        ({"query_active_dims": 0.1}, "all zero", True),
        ({"query_similarity": 0.99, "document_similarity": 0.9, "score_std": 0.4}, "constant vectors", True),
        ({"document_active_dims": 900.0}, "all dense", False),
        ({"loss": 80.0}, "saturated softmax", True),
        ({"dead_share": 0.999}, "dead vocabulary", False),
    ],
)
def test_what_is_wrong_is_named_with_evidence_and_mend(odd, name, collapse):
    (finding,) = diagnose(run(**odd), vocabulary=1000)
    assert (finding.name, finding.collapse) == (name, collapse)
    assert finding.step <= 15
    assert any(character.isdigit() for character in finding.evidence) or "nan" in finding.evidence
    assert finding.fix


@pytest.mark.parametrize("first, fix", [(0.0, "lower `shift`"), (40.0, "lower the regularizer weights")])
def test_vectors_of_zeros_are_blamed_on_the_head_where_they_were_so_from_the_start(first, fix):
    seen = run(document_active_dims=0.0)
    seen[0] = Observation(**HEALTHY | {"document_active_dims": first})
    (finding,) = diagnose(seen, vocabulary=1000)
    assert fix in finding.fix


def test_findings_of_older_versions_are_read(tmp_path):
    """They called the fix "mend", in checkpoints and in training.json."""
    (finding,) = diagnose(run(loss=80.0), vocabulary=1000)
    stored = asdict(finding)
    old = {"mend" if name == "fix" else name: value for name, value in stored.items()}
    assert renamed_findings([old, stored]) == [stored, stored]
    monitor = Monitor(1000)
    saved = {"observations": [], "findings": [old], "last_used": None}
    state = SimpleNamespace(max_steps=10, global_step=5, stateful_callbacks={"Monitor": saved})
    monitor.on_train_begin(None, state, None)
    assert monitor.findings == [finding]
    values = {field.name: {} for field in fields(TrainingResult)}
    record = values | {"monitoring": {"findings": [old]}, "restarts": [{"k": 1.0, "findings": [old]}]}
    (tmp_path / "training.json").write_text(json.dumps(record))
    result = _stored_result(tmp_path)
    assert result.monitoring["findings"] == result.restarts[0]["findings"] == [stored]


def test_one_odd_batch_is_no_finding():
    seen = run()
    seen[6] = Observation(**HEALTHY | {"step": 6, "loss": 80.0, "score_std": 0.1})
    assert diagnose(seen, vocabulary=1000) == []


def test_alike_but_told_apart_is_no_collapse():
    assert diagnose(run(query_similarity=0.99, document_similarity=0.99), vocabulary=1000) == []


def test_a_high_loss_is_no_finding_while_a_run_begins():
    assert diagnose(run(count=10, loss=80.0), vocabulary=1000) == []


def test_the_loss_is_as_before_and_may_be_a_dictionary(backbone):
    encoder = load_encoder(backbone)
    ranking = SparseMultipleNegativesRankingLoss(encoder)
    columns = [torch.rand(4, 149), torch.rand(4, 149)]
    expected = ranking.compute_loss_from_embeddings(columns, None)
    monitor = Monitor(149)
    monitor._due = True
    observed = ObservedLoss(ranking, monitor.see)
    assert torch.equal(observed.compute_loss_from_embeddings(columns, None), expected)
    observed.compute_loss_from_embeddings(columns, None)
    monitor.state()
    assert len(monitor.observations) == 1  # one a step, however many batches are accumulated
    assert monitor.observations[0].loss == pytest.approx(expected.item())
