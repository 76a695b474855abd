import pytest

from anysplade.data.headings import sections


@pytest.mark.parametrize(
    "text, expected",
    [
        ("# One #\na\n\n### Two `x` [link](http://a.b)\nb\nc", [("One", "a"), ("Two x link", "b\nc")]),
        ("# C#\na\n# C #\nb", [("C#", "a"), ("C", "b")]),
        ("before\n\nOne\n===\na\n\n~~~~~~~\nTwo two\n~~~~~~~\nb", [("One", "a"), ("Two two", "b")]),
        ("<p>x</p><h2 class='a'>Tom &amp; <b>Jerry</b></h2> <p>a</p>", [("Tom & Jerry", "<p>a</p>")]),
        ("# One\n```\n# a comment\n```\na", [("One", "```\n# a comment\n```\na")]),
        ("#hashtag\n#!/bin/sh\na | b\n--- | ---\ntitle: a long line of the front matter\n---", []),
    ],
)
def test_headings(text, expected):
    assert list(sections(text)) == expected
