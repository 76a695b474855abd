"""Headings in a text and the sections below them."""

import html
import re
from collections.abc import Iterator

_UNDERLINE = re.compile(r"""([=\-~^"'`:.+*#_])\1{2,}\s*""")
_FENCE = re.compile(r"\s*(?:```|~~~(?!~))")
_MARKDOWN = re.compile(r" {0,3}#{1,6}[ \t]+(\S.*)")
_HTML = re.compile(r"<h([1-6])\b[^<>]{0,200}>(.{0,300}?)</h\1\s*>", re.I | re.S)


def sections(text: str) -> Iterator[tuple[str, str]]:
    """The headings of a text (Markdown, HTML, underlined as in reStructuredText), each with the text up to the next one."""
    text = _HTML.sub(lambda found: f"\n# {' '.join(found[2].split())}\n", text)
    lines = text.split("\n")
    heading, body, fenced, i = "", list[str](), False, 0
    while i < len(lines):
        line, below = lines[i], lines[i + 1] if i + 1 < len(lines) else ""
        after_blank = i == 0 or not lines[i - 1].strip() or _UNDERLINE.fullmatch(lines[i - 1])
        underlined = _UNDERLINE.fullmatch(below) and line[:1].strip() and 2 * len(below.strip()) >= len(line.strip())
        markdown = _MARKDOWN.fullmatch(line)
        if _FENCE.match(line) and not _UNDERLINE.fullmatch(below):
            fenced = not fenced
        if not fenced and (markdown or (underlined and after_blank and not _UNDERLINE.fullmatch(line))):
            if body and _UNDERLINE.fullmatch(body[-1]):  # an overline belongs to the heading
                body.pop()
            if heading:
                yield heading, "\n".join(body).strip()
            heading, body = _without_markup(markdown[1] if markdown else line), []
            i += 1 if markdown else 2
        else:
            body.append(line)
            i += 1
    if heading:
        yield heading, "\n".join(body).strip()


def _without_markup(heading: str) -> str:
    opened = heading.rstrip().rstrip("#")
    if opened[-1:].isspace():  # "# Heading #", but not "# C#"
        heading = opened
    heading = re.sub(r"!?\[([^\[\]]*)\]\([^()]*\)", r"\1", heading)  # keeps a link's text
    heading = re.sub(r"<[^<>]{1,200}>|\{#[^{}]*\}|[*`]+", "", heading)
    return " ".join(html.unescape(heading).split())
