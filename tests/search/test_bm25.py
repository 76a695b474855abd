import math
import re
import unicodedata

import bm25s
import numpy as np
import pytest
import Stemmer

from anysplade import Collection, Document, evaluate
from anysplade.search import analysis
from anysplade.search.analysis import Analyzer
from anysplade.search.bm25 import BM25


def tokens(text):
    found = Analyzer().tokens([text])
    names = {i: token for token, i in found.vocab.items()}
    return [names[i] for i in found.ids[0]]


SPACED = [
    "The quick brown foxes are jumping over 2 lazy dogs; e-mail: a.b@example.com, x_1 C++ 3.14 AT&T don't",
    "Größe naïve Übermäßigkeit, Œuvre, ΑΘΗΝΑΙ, Москва и деревни, שלום עולם, مرحبا بالعالم",
    "tabs\tand\nlines\u200band\u00a0other\u3000spaces, ＦＵＬＬ ｗｉｄｔｈ, 😀 🐍",
    "",
]


@pytest.mark.parametrize("text", SPACED)
def test_tokens_of_scripts_with_spaces_are_those_of_bm25s(text):
    plain = bm25s.tokenize([text], stopwords="english", stemmer=Stemmer.Stemmer("porter"), show_progress=False)
    names = {i: token for token, i in plain.vocab.items()}
    assert tokens(text) == [names[i] for i in plain.ids[0]]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("हाथी और नमस्ते", ["हाथी", "और", "नमस्ते"]),
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("বাংলা ভাষা", ["বাংলা", "ভাষা"]),
        ("བོད་ཡིག", ["བོད", "ཡིག"]),
        ("Москва́ и деревни", ["москва́", "деревни"]),
        ("İstanbul", ["i̇stanbul"]),  # in lower case it has a mark
        (unicodedata.normalize("NFD", "café Übung"), ["café", "übung"]),  # the same tokens as composed
    ],
)
def test_marks_belong_to_their_letters(text, expected):
    assert tokens(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("信息检索。北京", ["信息", "息检", "检索", "北京"]),
        ("我, 3月", ["我", "月"]),  # one character alone
        ("Python编程 iPhone手机", ["python", "编程", "iphon", "手机"]),
        ("東京に住む・カタカナ", ["東京", "京に", "に住", "住む", "カタ", "タカ", "カナ"]),
        ("ﾊﾟｿｺﾝ", ["パソ", "ソコ", "コン"]),  # half width
        ("한국어 정보", ["한국", "국어", "정보"]),
        (unicodedata.normalize("NFD", "한국어 がか"), ["한국", "국어", "がか"]),
        ("𠮷野家", ["𠮷野", "野家"]),  # beyond 16 bits
        ("กินข้าว", ["กิน", "นข้", "ข้า", "าว"]),  # marks stay with their letters
        ("ພາສາ", ["ພາ", "າສ", "ສາ"]),
        ("ភាសា\u200bខ្មែរ", ["ភាសា", "សាខ្", "ខ្មែ", "មែរ"]),  # a space of no width is none
        ("မြန်မာ။", ["မြန်", "န်မာ"]),
    ],
)
def test_tokens_of_scripts_without_spaces(text, expected):
    assert tokens(text) == expected


def test_a_run_is_of_letters_and_marks():
    """Digits and punctuation end it, and no code point of another kind is in the ranges."""
    of_runs = [chr(i) for i in range(0x110000) if re.fullmatch(f"[{analysis._UNSPACED}]", chr(i))]
    assert {unicodedata.category(c)[0] for c in of_runs} <= {"L", "M", "N", "C"}
    assert {unicodedata.category(c) for c in of_runs if unicodedata.category(c)[0] == "N"} == {"Nl"}  # such as 〇


def collection(documents, queries):
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(len(queries))}
    return Collection(
        "c",
        {f"d{i}": Document("", text) for i, text in enumerate(documents)},
        {f"q{i}": text for i, text in enumerate(queries)},
        qrels,
    )


def test_scores_by_hand():
    """Lucene's ``log(1 + (N - n + 0.5) / (n + 0.5)) tf / (tf + k1 (1 - b + b length / mean length))``, k1 0.9 and b 0.4."""
    found = BM25(["kabel kabel lodan", "lodan", "mifil nugor pehan rajim"], stemmed=False)  # 8/3 words on average
    kabel, lodan = math.log(1 + 2.5 / 1.5), math.log(1 + 1.5 / 2.5)  # in one and in two of the three
    long, short = 0.9 * (0.6 + 0.4 * 9 / 8), 0.9 * (0.6 + 0.4 * 3 / 8)
    scores = [kabel * 2 / (2 + long) + lodan / (1 + long), lodan / (1 + short), 0]
    assert found.score("kabel lodan", np.array([2, 0, 1])) == pytest.approx([scores[2], scores[0], scores[1]])
    ((documents, best),) = found.top(["kabel lodan"], 3)
    assert documents.tolist() == [0, 1]  # none without a score above 0
    assert best == pytest.approx(scores[:2])
    assert [documents.tolist() for documents, _ in found.top(["lodan", "kabel", "sobel"], 1)] == [[1], [0], []]


def test_chinese_is_found(caplog):
    documents = ["信息检索是计算机科学的一个分支。", "北京是中华人民共和国的首都。", "熊猫喜欢吃竹子。"]
    found = evaluate("bm25", collection(documents, ["什么是信息检索", "中国首都北京", "熊猫吃什么"]), ["RR@10"])
    assert found.metrics["RR@10"] == 1
    assert not caplog.records


@pytest.mark.parametrize("documents, queries", [(["🐍", "..."], ["a word"]), (["two words"], ["?", "的"])])
def test_no_word_in_common_is_said(documents, queries, caplog):
    assert evaluate("bm25", collection(documents, queries[: len(documents)]), ["RR@10"]).metrics["RR@10"] == 0
    assert "bm25: no query of c has a word in common with a document, so every measure is 0" in caplog.text
