import pytest

from anysplade.data.text import count_words


@pytest.mark.parametrize(
    "text, words", [("one two, 3 — %", 3), ("東京タワー", 2.5), ("東京 tower", 2), ("กรุง 3.14", 2.5), ("", 0), ("。、", 0)]
)
def test_two_characters_without_spaces_are_a_word(text, words):
    assert count_words(text) == words
