import pytest
from hypothesis import given
from hypothesis import strategies as st

from anysplade.errors import DataError
from anysplade.model.vocabulary import name_terms, read_entries, term_names
from vocabularies import SPECIAL, byte_level, sentence_pieces, word_pieces


def names_of(tokenizer):
    backend = tokenizer.backend_tokenizer
    tokens = [backend.id_to_token(id_) for id_ in range(backend.get_vocab_size())]
    return dict(zip(tokens, term_names(backend, len(tokens)), strict=True))


def test_terms_are_named_as_words_whatever_the_vocabulary_marks():
    names = names_of(byte_level())
    assert names["Ġpy"] == "py"
    assert names["py"] == "##py"
    assert names["ing"] == "##ing"
    assert names["ĠPy"] == "Py"
    assert names[")"] == ")"
    assert names["Ġ)"] == "▁)"
    assert names["Ã©"] == "##é"
    names = names_of(sentence_pieces())
    assert names["▁the"] == "the"
    assert names["s"] == "##s"
    assert names["▁s"] == "s"
    assert names["▁("] == "▁("
    assert names["("] == "("
    names = names_of(word_pieces())
    assert all(token == name for token, name in names.items())


@pytest.mark.parametrize("make", [byte_level, sentence_pieces, word_pieces])
def test_names_are_unique_and_special_tokens_keep_theirs(make):
    names = names_of(make())
    assert len(set(names.values())) == len(names)
    assert [names[token] for token in SPECIAL] == SPECIAL


def test_what_is_no_text_keeps_its_token():
    names = names_of(byte_level())
    assert (names["Ġ"], names["Ċ"], names["Ã"]) == ("Ġ", "Ċ", "Ã")  # a space, a new line, half a character
    backend = byte_level().backend_tokenizer
    assert term_names(backend, backend.get_vocab_size() + 2)[-1] == f"[term:{backend.get_vocab_size() + 1}]"  # a padded head


def test_entries_say_where_words_begin():
    backend = byte_level().backend_tokenizer
    entries = {entry.text: entry.begins for entry in read_entries(backend, backend.get_vocab_size())}
    assert entries["going"]
    assert "ing" in entries
    assert "<s>" not in entries
    assert not {entry.text for entry in read_entries(word_pieces().backend_tokenizer, 8)} & set(SPECIAL)


@given(st.lists(st.none() | st.text(max_size=3), max_size=30))
def test_names_of_any_tokens_are_unique(tokens):
    try:
        names = name_terms(tokens)
    except DataError:
        assert any(token and token.startswith("[term:") for token in tokens)
    else:
        assert len(set(names)) == len(names) == len(tokens)
