from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SparseEncoder

from anysplade import Document, OptionError
from anysplade.errors import ModelError
from anysplade.model.options import Window, checked_passages
from anysplade.model.passages import Passages, Splitter, window_spans
from tiny import WORDS


@pytest.mark.parametrize(
    ("given", "window", "text"), [("128", (128, 128), "128"), (128, (128, 128), "128"), ("128:64", (128, 64), "128:64")]
)
def test_windows(given, window, text):
    assert checked_passages(given) == window
    assert str(checked_passages(given)) == text


@pytest.mark.parametrize("given", ["0", "-1", "64:128", "128:0", "128:", "", "a:1", "1.5", 0, True, "128:64:32"])
def test_impossible_windows(given):
    with pytest.raises(OptionError, match="passages"):
        checked_passages(given)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 7), max_size=20), st.integers(1, 9), st.data())
def test_passages_cover_a_text_in_whole_words(lengths, length, data):
    window = Window(length, data.draw(st.integers(1, length)))
    words = [word for word, count in enumerate(lengths) for _ in range(count)]
    spans = window_spans(words, window)
    assert spans[0][0] == 0
    assert spans[-1][1] == len(words)
    for (start, end), (following, last) in pairwise(spans):
        assert start < following <= end < last  # no gap, and none within another
    starts = {0, len(words), *(i for i in range(1, len(words)) if words[i] != words[i - 1])}
    for start, end in spans:
        assert end - start <= length
        if max(lengths, default=0) <= window.stride:
            assert {start, end} <= starts


def test_a_stride_overlaps():
    assert window_spans(range(10), Window(4, 4)) == [(0, 4), (4, 8), (8, 10)]
    assert window_spans(range(10), Window(4, 2)) == [(0, 4), (2, 6), (4, 8), (6, 10)]
    assert window_spans([0, 0, 0, 1, 1, 2], Window(4, 4)) == [(0, 3), (3, 6)]


def test_texts_and_titles(backbone):
    encoder = SparseEncoder(backbone)
    corpus = {
        "long": Document("kabel lobel", " mibel, nubel  pebel\n\nrabel sobel"),
        "short": Document("", " kabel  lobel "),
        "empty": Document("", ""),
        "bytes": Document("", "mibel \ud800 nubel \U0001f600 pebel rabel sobel"),
    }
    passages = Passages(corpus, Splitter(encoder, Window(4, 4), "model"))
    assert passages.starts.tolist() == [0, 2, 3, 4, 6]
    texts = ["kabel lobel  mibel, nubel  pebel", "kabel lobel rabel sobel", "kabel  lobel", ""]
    assert passages[:] == [*texts, "mibel \ud800 nubel \U0001f600", "pebel rabel sobel"]
    assert [passages[i] for i in range(len(passages))] == passages[:]


def test_what_a_model_cannot_read(backbone, monkeypatch):
    encoder = SparseEncoder(backbone)
    encoder[0].max_seq_length = 64
    Splitter(encoder, Window(62, 62), "model")
    with pytest.raises(OptionError, match=r"`passages` is 63: model reads 64 tokens, 2 of them .* at most 62"):
        Splitter(encoder, Window(63, 63), "model")
    long = Document(" ".join(WORDS[:40]), " ".join(WORDS[:100]))
    (spans,) = Splitter(encoder, Window(60, 60), "model").split([long])
    assert len(spans) == 4  # 30 words each: half of the window, although the title leaves room for 22
    (spans,) = Splitter(encoder, Window(60, 60), "model").split([long._replace(title=" ".join(WORDS[:20]))])
    assert len(spans) == 3  # 42 words each, which is what the title leaves
    monkeypatch.setattr("anysplade.model.passages.reader", lambda *_: None)
    with pytest.raises(ModelError, match="cannot split texts"):
        Splitter(encoder, Window(4, 4), "model")
