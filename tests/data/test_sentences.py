import pytest

from anysplade import Document
from anysplade.data.sentences import _is_informative, sentence_pair
from anysplade.data.text import count_words

BREAD = "Bread needs flour, water, salt and patience. A slow dough tastes better than a quick one. Bakers rise early in every town."


@pytest.mark.parametrize(
    "sentence, expected",
    [
        ("Lamps were lit early", True),
        ("Lamps were lit", False),  # three words
        ("Lamps of it to an in", False),  # one of three letters or more
        ("Lamps lamps were were", False),
        ("Lamps were 7 long nights", False),  # a mark of code or a digit in 24 characters
        ("Lamps were 7 long evening", True),  # in 25
        ("The harbour slept " * 13 + "there", True),  # 40 words
        ("The harbour slept " * 13 + "there again", False),
    ],
)
def test_what_can_stand_for_a_query(sentence, expected):
    assert _is_informative(sentence) == expected


def test_texts_without_punctuation_give_a_part():
    text = (
        "an electronic analogue computer for solving systems of linear equations mathematical derivation of the operating principle"
    )
    query, positive = sentence_pair("d", Document("", text))
    assert 6 <= len(query.split()) <= 15
    assert query in text
    assert len(query.split()) + len(positive.split()) == len(text.split())
    assert sentence_pair("d", Document("", "six words are not enough here")) is None


@pytest.mark.parametrize(
    "text",
    [
        "東京は日本の首都であり世界最大級の都市です。多くの人が毎日電車で通勤しています。春には公園で桜がきれいに咲きます。",
        "北京是中国的首都也是一座古老的城市。每年有许多游客来参观故宫和长城！冬天的北京非常寒冷而且经常刮风。",
        "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทยและเป็นเมืองที่มีประชากรมากที่สุด มีแม่น้ำเจ้าพระยาไหลผ่านกลางเมือง",
        "東京は日本の首都であり世界最大級の都市で多くの人が毎日電車で通勤していて春には公園で桜がきれいに咲きます",
    ],
)
def test_scripts_without_spaces(text):
    query, positive = sentence_pair("d", Document("", text))
    assert query in text
    assert 4 <= count_words(query) <= 40
    assert len("".join((query + positive).split())) == len("".join(text.split()))


def test_sentences_of_code_are_its_words():
    code = 'def paste(xsel=False): """Returns the contents of the clipboard.""" kind = "a" if xsel else "b" return run(kind, xsel)'
    query, positive = sentence_pair("d", Document("", code))
    assert query == "Returns the contents of the clipboard."
    assert positive.startswith("def paste(xsel=False):")
    assert sentence_pair("d", Document("", "x = f(a, b); y = g(x, c); return {k: v for k, v in zip(x, y) if k != v}")) is None


def test_abbreviations_end_no_sentence():
    text = "Dr. Miller met them, e.g. at the old harbour, with J. Smith. " + BREAD
    found = {sentence_pair(str(i), Document("", text))[0] for i in range(30)}
    assert found == {"Dr. Miller met them, e.g. at the old harbour, with J. Smith.", *(f"{s}." for s in BREAD[:-1].split(". "))}
