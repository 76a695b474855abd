import numpy as np
import pytest

from anysplade import Pair, load_encoder
from anysplade.model.head import find_head
from anysplade.model.modules import cut_at, masked_lm
from anysplade.training import level
from anysplade.training.config import TrainingConfig
from anysplade.training.level import active_dims, flops, trim_flops, warn_of_missed_targets
from tiny import WORDS, make_lexical

PAIRS = [Pair("kabel lodan", "kabel mifil nugor"), Pair("kabel", "lodan")]


@pytest.fixture
def lexical(tmp_path):
    """An encoder whose terms are the words of a text that the tokenizer knows."""
    return load_encoder(make_lexical(tmp_path / "lexical"), 1, 0)


def test_active_dims_and_flops_by_hand(lexical, monkeypatch):
    monkeypatch.setattr(level, "PROBE_QUERIES", ("mifil", "mifil", "mifil", "kabel"))
    assert active_dims(lexical, PAIRS) == (3 / 2, 4 / 2)
    # P(in query) P(in document): kabel 1 * 1/2 and lodan 1/2 * 1/2; of the everyday queries mifil 3/4 * 1/2 and kabel 1/4 * 1/2.
    assert flops(lexical, PAIRS).tolist() == [3 / 4, 1 / 2]


@pytest.mark.parametrize("pairs", [1, 200, 201, 399, 400, 1001])
def test_the_sample_is_evenly_spaced(pairs):
    sample = level._texts([Pair(str(i), "") for i in range(pairs)], "query")
    assert len(sample) == len(set(sample)) == min(pairs, 200)
    assert sample[0] == "0"
    assert pairs - int(sample[-1]) <= -(-pairs // 200)


@pytest.mark.parametrize(
    "dims, targets, missed",
    [
        ((90.0, 110.0), (100.0, 100.0), []),
        ((89.0, 100.0), (100.0, 100.0), ["query"]),
        ((100.0, 111.0), (100.0, 100.0), ["document"]),
        ((1.0, 300.0), (None, 100.0), ["document"]),
        ((1.0, 1.0), (None, None), []),
    ],
)
def test_targets_that_are_missed_by_more_than_a_tenth(dims, targets, missed, caplog):
    config = TrainingConfig("bert-tiny", "docs", output="out", query_active_dims=targets[0], document_active_dims=targets[1])
    warn_of_missed_targets(config, dims)
    assert [role for role in ("query", "document") if f" {role} active dims, the target was" in caplog.text] == missed


def test_a_shift_that_is_smaller_by_a_step_leaves_too_many_flops(backbone, monkeypatch):
    monkeypatch.setattr(level, "PROBE_QUERIES", ("mifil", "rajim sobel"))
    encoder = load_encoder(backbone, 1, 0)
    bias, most = find_head(masked_lm(encoder)).bias, 0.8 * flops(encoder, PAIRS)
    before = bias.clone()
    shift = trim_flops(encoder, PAIRS, most)
    assert 0 < shift < 1
    assert (before - bias).tolist() == pytest.approx([shift] * len(bias), abs=1e-6)
    assert (flops(encoder, PAIRS) <= most).all()
    bias += 1 / level._STEPS
    assert (flops(encoder, PAIRS) > most).any()


def test_no_shift_is_larger_than_1(lexical, monkeypatch):
    monkeypatch.setattr(level, "PROBE_QUERIES", ("mifil", "rajim sobel"))
    before = find_head(masked_lm(lexical)).bias.clone()
    assert trim_flops(lexical, PAIRS, np.array([-1.0, -1.0])) == 1
    assert (before - find_head(masked_lm(lexical)).bias).tolist() == [1] * len(before)


def test_the_target_of_batches_is_lower_by_what_the_training_does_not_read(lexical):
    """Each word is a term of equal weight; of ten words in a document training reads four."""
    words = [word for word in WORDS if word.isalpha()][:20]
    pairs = [Pair("kabel", " ".join(words[:10])), Pair("kabel", " ".join(words[10:]))]
    cut_at(lexical, 4 + 2)
    assert level.batch_target(lexical, pairs, [64], "document", 10) == pytest.approx(4)
    assert level.batch_target(lexical, pairs, [64], "query", 10) == 10  # none is cut
    assert level.batch_target(lexical, pairs, [6], "document", 10) == 10  # no more is read later either
    assert lexical.max_seq_length == 6
