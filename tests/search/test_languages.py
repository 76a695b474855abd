import logging

import pytest

from anysplade.errors import OptionError
from anysplade.search.analysis import Analyzer
from anysplade.search.bm25 import BM25
from anysplade.search.languages import detect_language, language_name, stop_words

TEXTS = {
    "english": "The museum was built in the last century and is one of the largest in the country, but it has been closed.",
    "german": "Das Museum wurde im letzten Jahrhundert gebaut und ist eines der größten des Landes, aber es ist nicht geöffnet.",
    "dutch": "Het museum werd in de vorige eeuw gebouwd en is een van de grootste van het land, maar het is niet open.",
    "french": "Le musée a été construit au siècle dernier et c'est un des plus grands du pays, mais il est fermé pour des travaux.",
    "spanish": "El museo fue construido en el siglo pasado y es uno de los más grandes del país, pero no está abierto.",
    "portuguese": "O museu foi construído no século passado e é um dos maiores do país, mas não está aberto ao público.",
    "italian": "Il museo è stato costruito nel secolo scorso ed è uno dei più grandi del paese, ma non è aperto al pubblico.",
    "catalan": "El museu va ser construït al segle passat i és un dels més grans del país, però no és obert amb els altres.",
    "romanian": "Muzeul a fost construit în secolul trecut și este unul din cele mai mari, dar nu se deschide pentru public.",
    "danish": "Museet blev bygget i det sidste århundrede og er et af de største i landet, men det er ikke åbent for os.",
    "swedish": "Museet byggdes under det förra seklet och är ett av de största i landet, men det är inte öppet för oss.",
    "finnish": "Museo on rakennettu viime vuosisadalla ja se on yksi maan suurimmista, mutta se ei ole auki kun sataa.",
    "polish": "Muzeum zostało zbudowane w zeszłym wieku i jest jednym z największych, ale nie jest to otwarte dla nas.",
    "hungarian": "A múzeum az elmúlt században épült és az ország egyik legnagyobb épülete, de nem nyitott, ha esik is.",
    "turkish": "Müze geçen yüzyılda yapıldı ve ülkenin en büyük yapılarından biri ama bu yıl çok az kişi için açık.",
    "indonesian": "Museum ini dibangun pada abad yang lalu dan merupakan salah satu yang terbesar di negara itu, tidak dibuka.",
    "russian": "Музей был построен в прошлом веке и это один из самых больших в стране, но он не открыт для всех.",
    "arabic": "بني المتحف في القرن الماضي وهو من أكبر المتاحف في البلاد لكن هذا المبنى لا يفتح على الجمهور",
    "persian": "این موزه در قرن گذشته ساخته شده است و از بزرگترین موزه های کشور است که برای همه باز نیست",
    "hindi": "यह संग्रहालय पिछली सदी में बनाया गया था और देश के सबसे बड़े संग्रहालयों में से एक है",
    "greek": "Το μουσείο χτίστηκε τον περασμένο αιώνα",
    "tamil": "அருங்காட்சியகம் கடந்த நூற்றாண்டில் கட்டப்பட்டது",
    "chinese": "该博物馆建于上个世纪，是全国最大的博物馆之一。",
    "korean": "박물관은 지난 세기에 지어졌다",
}
UNKNOWN = [
    "この博物館は前世紀に建てられた、国内最大の博物館の一つです。",  # Japanese
    "พิพิธภัณฑ์สร้างขึ้นในศตวรรษที่แล้ว",
    "Музеят е построен през миналия век и е един от най-големите в страната, но не е отворен за всички.",  # Bulgarian
    "Музей був побудований у минулому столітті і це один із найбільших в країні, але він не є відкритий для всіх.",  # Ukrainian
    "Múzeum bolo postavené v minulom storočí a je jedno z najväčších, ale nie je to otvorené pre nás.",  # Slovak
    "kabel lodan mifil nugor pehan rajim",
    "3.14 🐍",
    "",
]


@pytest.mark.parametrize("language", TEXTS)
def test_the_language_of_a_sentence(language):
    assert detect_language([TEXTS[language]]) == language
    assert language_name(language) == language


@pytest.mark.parametrize("text", UNKNOWN)
def test_no_language(text):
    assert detect_language([text]) == "none"


def test_most_texts_decide():
    assert detect_language([*[TEXTS["german"]] * 3, TEXTS["english"]]) == "german"
    assert detect_language([]) == "none"


def test_source_code_in_english():
    """Little evidence is enough for English, but some is needed."""
    code = "def get(self, key, default=None): if key not in self._rows: return default; for row in self._rows: yield row"
    assert detect_language([code]) == "english"
    assert detect_language(["x = numpy.zeros(3); y = x.T @ x; print(x, y)"]) == "none"


@pytest.mark.parametrize(
    "given, name",
    [("de", "german"), ("German", "german"), ("NB", "norwegian"), ("auto", "auto"), ("none", "none")],
)
def test_names_and_codes(given, name):
    assert language_name(given) == name


@pytest.mark.parametrize("given, hint", [("germn", "did you mean german?"), ("ja", "give 'auto', 'none' or one of arabic")])
def test_an_unknown_language(given, hint):
    with pytest.raises(OptionError, match="BM25 has no stemmer and no stop words") as caught:
        language_name(given)
    assert hint in str(caught.value)
    with pytest.raises(OptionError, match="`language` is a NoneType"):
        language_name(None)


@pytest.mark.parametrize(
    "language, text, expected",
    [
        ("german", "die Häuser und die Häusern", ["haus", "haus"]),
        ("french", "l'étude des chevaux et du cheval", ["étud", "cheval", "cheval"]),
        ("russian", "о книгах и книга", ["книг", "книг"]),
        ("turkish", "IRMAK ırmak İLE ile", ["ırmak", "ırmak"]),  # its small letters
        ("none", "the cats and the dogs", ["the", "cats", "and", "the", "dogs"]),
        ("hungarian", "házak a ház", ["ház", "ház"]),  # a stemmer without stop words; words of one letter are none
        ("chinese", "什么是信息", ["么是", "是信", "信息"]),
    ],
)
def test_stems(language, text, expected):
    found = Analyzer(language).tokens([text])
    names = {number: token for token, number in found.vocab.items()}
    assert [names[number] for number in found.ids[0]] == expected


def test_english_has_the_short_list_of_lucene():
    assert len(stop_words("english")) == 33
    assert {"the", "of", "such"} <= set(stop_words("english"))


def test_bm25_takes_the_language_of_its_texts(caplog):
    caplog.set_level(logging.INFO, "anysplade")
    assert BM25([TEXTS["english"]]).language == "english"
    assert not caplog.records
    german = BM25([TEXTS["german"], "Ein Haus steht am Wald."])
    assert german.language == "german"
    assert [documents.tolist() for documents, _ in german.top(["die Wälder", "das"], 2)] == [[1], []]
    assert "bm25: stemmer and stop words of german, the language of most texts" in caplog.text
    assert BM25(UNKNOWN[:1]).language == "none"
    assert "bm25: no stemmer and no stop words" in caplog.text
    named = BM25([TEXTS["german"]], language="en")
    assert named.language == "english"
    assert len(caplog.records) == 2
