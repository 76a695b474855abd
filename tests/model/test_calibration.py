from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anysplade import ModelError, OptionError, Pair, calibrate, rescale_head
from anysplade.data.pairs import sample_pairs
from anysplade.model.calibration import (
    ACTIVE_SHARE,
    MEAN_EXCESS,
    MEAN_EXCESS_SCALE_ONLY,
    Calibration,
    _share,
    choose,
    is_sparse,
    mean_excess,
)
from anysplade.model.checkpoints import load_masked_lm
from anysplade.model.measuring import Probe, measure_logits, summarize_probe

TEXTS = ["kabel lodan", "mifil nugor pehan"], ["rajim sobel tucor", "kadan lofil"]


def probe(seed=0, scale=1.0):
    """Logits of 200 tokens in 10 texts over 500 terms."""
    logits = (scale * np.random.default_rng(seed).normal(-3, 2, (200, 500))).astype(np.float32)
    pooled = logits.reshape(10, 20, 500).max(axis=1)
    return Probe(logits, pooled[:5], pooled[5:], np.zeros(500, np.float32))


def test_level_is_met():
    chosen = choose(probe())
    assert chosen.after.positive_share == pytest.approx(ACTIVE_SHARE, rel=0.05)
    assert chosen.before.positive_share > chosen.after.positive_share


def test_the_mean_excess_by_hand():
    """The highest fifth of 0, 1, …, 9 begins at 0.8 * 9 = 7.2; of it 8 and 9 lie above that, on average 8.5."""
    assert mean_excess(np.arange(10.0), 0.2) == pytest.approx(8.5 - 7.2)
    assert mean_excess(np.ones(10), 0.2) == 0


def test_the_scale_is_met():
    for raw in (probe(), probe(scale=30.0)):
        for shift, wanted in (("auto", MEAN_EXCESS), (0.0, MEAN_EXCESS_SCALE_ONLY)):
            chosen = choose(raw, shift=shift)
            calibrated = raw.affine(chosen.k, chosen.shift, "scale").token_logits
            assert mean_excess(calibrated, ACTIVE_SHARE) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("scale, digits", [(1.0, 4), (30.0, 2), (300.0, 1), (0.01, 6)])
def test_the_level_is_rounded_to_a_thousandth_of_the_scale(scale, digits):
    """Three digits below the first one of the mean excess, which is 0.5976, 17.9, 179 and 0.005976."""
    level = np.quantile(probe(scale=scale).token_logits, 1 - ACTIVE_SHARE)
    assert choose(probe(scale=scale), k=1.0).shift == round(float(level), digits)


def test_the_share_above_zero_by_hand():
    """Four terms of the median text: its fourth highest logit is the lowest that stays, and a third of all are as high."""
    pooled = np.array([[9.0, 8, 7, 6, 5, 4], [6, 5, 4, 3, 2, 1], [3, 2, 1, 0, 0, 0]], np.float32)  # the fourth: 6, 3 and 0
    tokens = np.array([[1, 2, 3, 0, 0, 5], [0, 0, 0, 0, 0, 6]], np.float32)  # 3 of 12 are 3 or more
    low = np.zeros((1, 1), np.float32)  # no term of it is taken away
    assert _share(Probe(tokens, pooled, low, None), 0) == _share(Probe(tokens, low, pooled, None), 0) == 3 / 12
    assert _share(Probe(tokens, pooled, low, None), 1) == 1 / 12  # round(4 / 3) = 1 term of the median text, whose highest is 6
    assert _share(Probe(tokens, pooled, low, None), 3) == 1 / 12  # never less than one term
    assert _share(Probe(tokens, low, low, None), 2) == ACTIVE_SHARE / 9


REPORT = summarize_probe(probe())
SPARSE = {"positive_share": 0.001, "document_active_dims": 40.0, "start_loss": 1.0, "chance": 2.0}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, True),
        ({"start_loss": 1.79}, True),
        ({"start_loss": 1.8}, False),  # 0.9 times the loss of guessing
        ({"start_loss": None}, False),
        ({"positive_share": 0.0011}, False),  # more than the calibrated head has
        ({"document_active_dims": 0.5}, True),
        ({"document_active_dims": 0.4}, False),
    ],
)
def test_what_a_sparse_head_is(change, expected):
    before, after = replace(REPORT, **SPARSE | change), replace(REPORT, positive_share=0.001)
    assert is_sparse(Calibration(2.0, 1.0, "scale", before, after)) == expected
    assert not is_sparse(Calibration(2.0, 1.0, "scale", None, None))


@pytest.mark.parametrize(
    "queries, documents, cosine, loss, verdict",
    [
        (9.0, 9.0, 0.65, 20.0, "trains"),
        (9.0, 9.0, 0.66, 20.0, "degrades"),
        (9.0, 9.0, 0.65, 20.1, "degrades"),  # ten times the loss of guessing, which is 2
        (9.0, 9.0, 0.66, 20.1, "collapses"),
        (9.0, 9.0, 0.66, None, "degrades"),
        (0.5, 0.5, 0.1, 1.0, "trains"),
        (0.4, 9.0, 0.1, 1.0, "collapses"),
        (9.0, 0.4, 0.1, 1.0, "collapses"),
    ],
)
def test_the_verdict_by_hand(queries, documents, cosine, loss, verdict):
    dims = {"query_active_dims": queries, "document_active_dims": documents}
    start = replace(REPORT, **dims, document_similarity=cosine, start_loss=loss, chance=2.0)
    healthy = replace(start, **dict.fromkeys(dims, 9.0), document_similarity=0.1, start_loss=1.0)
    assert Calibration(2.0, 1.0, "scale", start, healthy).verdicts == (verdict, "trains")
    assert Calibration(2.0, 1.0, "scale", healthy, start).verdicts == ("trains", verdict)


def test_probe_texts_are_a_sample_of_the_pairs():
    pairs = [Pair(f"q{i}", f"d{i}") for i in range(100)]
    queries, documents = sample_pairs(pairs)
    assert len(set(queries)) == 64
    assert [query[1:] for query in queries] == [document[1:] for document in documents]
    assert sorted(sample_pairs(pairs[:3])[0]) == ["q0", "q1", "q2"]


@settings(max_examples=30, deadline=None)
@given(factor=st.floats(0.01, 100), seed=st.integers(0, 5))
def test_equivariance(factor, seed):
    """A head inflated by a factor gets a k larger by it, and ends as the same head."""
    one, inflated = choose(probe(seed)), choose(probe(seed, factor))
    assert inflated.k == pytest.approx(one.k * factor, rel=1e-3)
    assert inflated.shift == pytest.approx(one.shift, rel=1e-3)
    assert inflated.after.score_std == pytest.approx(one.after.score_std, rel=1e-2)


def test_equivariance_of_a_real_head(backbone):
    model, tokenizer = load_masked_lm(backbone)
    one = calibrate(model, tokenizer, *TEXTS)
    rescale_head(model, k=0.1)
    ten = calibrate(model, tokenizer, *TEXTS)
    assert ten.k == pytest.approx(10 * one.k, rel=1e-3)
    assert ten.shift == pytest.approx(one.shift, rel=1e-3)


def test_calibrating_twice_changes_nothing(backbone):
    model, tokenizer = load_masked_lm(backbone)
    first = calibrate(model, tokenizer, *TEXTS)
    rescale_head(model, first.k, first.shift)
    second = calibrate(model, tokenizer, *TEXTS)
    assert (second.k, second.shift) == (1, 0)


@settings(max_examples=30, deadline=None)
@given(factor=st.floats(0.01, 100), seed=st.integers(0, 20), bias=st.floats(-30, 30))
def test_a_calibrated_head_asks_for_no_change_at_all(factor, seed, bias):
    raw = probe(seed, factor).affine(1.0, bias, "scale")
    raw = Probe(raw.token_logits, raw.query_logits, raw.document_logits, np.zeros(500, np.float32))
    first = choose(raw)
    after = raw.affine(first.k, first.shift, "scale")
    second = choose(Probe(after.token_logits, after.query_logits, after.document_logits, np.zeros(500, np.float32)))
    assert (second.k, second.shift) == (1, 0)


def sparse_probe(level):
    """Ten queries and their documents over 2,000 terms: of each token, its own term alone is above zero."""
    generator = np.random.default_rng(0)
    logits = generator.normal(-6, 0.3, (200, 2000)).astype(np.float32)
    own = generator.choice(2000, (10, 10), replace=False)
    for i in range(10):
        logits[10 * i + np.arange(10), own[i]] = level  # the query's tokens
        logits[100 + 10 * i + np.arange(10), own[i]] = level
    pooled = logits.reshape(20, 10, 2000).max(axis=1)
    return Probe(logits, pooled[:10], pooled[10:], np.zeros(2000, np.float32))


def test_a_sparse_head_that_retrieves_stays_as_it_is():
    kept = choose(sparse_probe(3.0))
    assert (kept.k, kept.shift) == (1, 0)
    assert kept.after == kept.before
    assert kept.declined is not None
    assert kept.declined[1] < 0
    assert kept.explanation.startswith("already sparse: use it as it is (")
    assert list(kept.sides) == ["as it is"]
    assert next(iter(choose(probe()).sides)) == "raw"
    assert list(kept.to_pandas()["head"]) == ["as it is"]
    assert choose(sparse_probe(3.0), k=2.0, shift=0.5).declined is None  # numbers are applied
    assert choose(sparse_probe(3.0), strength=1).declined is None  # it collapsed in training


def test_a_sparse_head_that_finds_nothing_is_calibrated():
    measured = sparse_probe(3.0)
    shuffled = Probe(measured.token_logits, measured.query_logits[::-1], measured.document_logits, measured.bias)
    assert choose(shuffled).declined is None
    assert choose(sparse_probe(-1.0)).declined is None  # nothing is above zero


def test_what_is_known_to_be_trained_stays_as_it_is():
    assert choose(probe()).declined is None
    assert choose(probe(), trained=True).declined is not None


@pytest.mark.parametrize("vocabulary", [5, 25, 200])
def test_texts_keep_terms_of_a_small_vocabulary(vocabulary):
    logits = np.random.default_rng(0).normal(-3, 2, (200, vocabulary)).astype(np.float32)
    pooled = logits.reshape(20, 10, vocabulary).max(axis=1)
    chosen = choose(Probe(logits, pooled[:10], pooled[10:], np.zeros(vocabulary, np.float32)))
    assert chosen.after.query_active_dims >= 3
    assert chosen.after.document_active_dims >= 3


def test_texts_without_a_term_do_not_train():
    assert choose(probe(), k=1.0, shift=1000.0).verdicts[1] == "collapses"


def test_it_is_deterministic(backbone):
    model, tokenizer = load_masked_lm(backbone)
    assert calibrate(model, tokenizer, *TEXTS) == calibrate(model, tokenizer, *TEXTS)


def test_each_unit_of_strength_leaves_a_third_as_many_logits():
    shares = [choose(probe(), strength=strength).after.positive_share for strength in (0, 1)]
    assert shares[1] == pytest.approx(shares[0] / 3, rel=0.1)


@pytest.mark.parametrize("name", ["bert-tiny", "modernbert-tiny"])
def test_the_verdict_on_the_bundled_backbones_is_what_training_them_shows(name):
    model, tokenizer = load_masked_lm(name)
    assert calibrate(model, tokenizer).verdicts == ("collapses", "trains")


def test_a_head_without_bias_gets_k_alone(caplog):
    measured = probe()
    chosen = choose(Probe(measured.token_logits, measured.query_logits, measured.document_logits, None))
    assert chosen.shift == 0
    assert chosen.k == choose(measured, shift=0.0).k
    assert "no bias" in caplog.text


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_dead_head_is_refused(value):
    logits = np.full((20, 50), value, np.float32)
    with pytest.raises(ModelError, match="all equal or not finite"):
        choose(Probe(logits, logits, logits, np.zeros(50, np.float32)))


def test_each_can_be_given():
    level_alone = choose(probe(), k=1.0)
    assert level_alone.k == 1
    assert level_alone.after.positive_share == pytest.approx(ACTIVE_SHARE, rel=0.05)
    scale_alone = choose(probe(), shift=0.0)
    assert scale_alone.shift == 0
    assert scale_alone.after.positive_share == scale_alone.before.positive_share
    assert scale_alone.k > 1


@pytest.mark.parametrize("policy", ["scale", "keep"])
def test_what_is_foretold_is_what_comes(backbone, policy):
    model, tokenizer = load_masked_lm(backbone)
    chosen = calibrate(model, tokenizer, *TEXTS, bias=policy)
    rescale_head(model, chosen.k, chosen.shift, policy)
    after = summarize_probe(measure_logits(model, tokenizer, *TEXTS))
    assert after.query_active_dims == pytest.approx(chosen.after.query_active_dims, rel=0.05)
    assert after.positive_share == pytest.approx(chosen.after.positive_share, rel=0.05)


def test_impossible_options(backbone):
    model, tokenizer = load_masked_lm(backbone)
    with pytest.raises(OptionError, match="k is 0"):
        calibrate(model, tokenizer, *TEXTS, k=0)
    with pytest.raises(OptionError, match="k is -1"):
        calibrate(model, tokenizer, *TEXTS, k=-1)
    with pytest.raises(OptionError, match="at least one query"):
        calibrate(model, tokenizer, [], [])
