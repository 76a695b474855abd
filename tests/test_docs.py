"""The pages: the guide runs as it stands, every other command parses, and the site has no broken link.

A block marked ``bash`` or ``python`` in the guide runs; one marked ``sh`` is only parsed.
"""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cyclopts import App

import anysplade
from anysplade.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, *languages):
    """Language and text of the page's code blocks in these languages."""
    return [(language, text) for language, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page):
    """The arguments of every ``anysplade`` command in the page's code; those that a bare name or "..." leaves open are --help."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    code = "".join(block for language, block in _BLOCK.findall(text) if language in ("bash", "sh"))
    text = _BLOCK.sub("", text)
    lines = [line.strip() for line in [*code.splitlines(), *re.findall(r"^ {4}.*$", text, re.MULTILINE)]]
    lines += [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text)]
    for line in lines:
        if match := re.match(r"(?:\S+/)?anysplade +(.+)", line):
            lexer = shlex.shlex(match[1], posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            arguments = list(lexer)
            for end in ("&", "..."):
                arguments = arguments[: arguments.index(end)] if end in arguments else arguments
            yield arguments if len(arguments) > 1 else [*arguments, "--help"]


def test_the_guide_runs_in_one_process(tmp_path, monkeypatch, capsys):
    """All commands and scripts but the server, with fewer steps."""
    monkeypatch.chdir(tmp_path)
    ran = []
    for language, text in blocks(ROOT / "docs" / "guide.md", "bash", "python"):
        text = text.replace("--steps 20", "--steps 2").replace("steps=20", "steps=2")
        if language == "python":
            exec(compile(text, "guide.md", "exec"), {})
        elif "anysplade serve" not in text:
            for line in text.splitlines():
                program, *arguments = shlex.split(line)
                assert (program, main(arguments)) == ("anysplade", 0), capsys.readouterr().err
                ran.append(arguments[0])
    assert ran == ["inspect", "train", "evaluate", "index", "search", "encode"]


@pytest.mark.slow  # a minute and a half of processes; above is the same in one, and test_app starts the server
def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    ran = set()
    for language, text in blocks(ROOT / "docs" / "guide.md", "bash", "python"):
        ran.add(language)
        if language == "python":
            exec(compile(text, "guide.md", "exec"), {})
        else:
            script = "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n" + text.replace("8080", port)
            subprocess.run(["bash", "-euo", "pipefail", "-c", script], check=True, env=environment)
    assert ran == {"bash", "python"}


def test_the_readme_runs(collection_folder, tmp_path, monkeypatch):
    for name in ("corpus.jsonl", "pairs.jsonl"):
        (tmp_path / name).write_bytes((collection_folder / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    names = {}
    for _, text in blocks(ROOT / "README.md", "python"):
        exec(compile(text, "README.md", "exec"), names)
    assert len(names["hits"]) == 10
    names["index"].close()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_parses(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(App, "__call__", App.parse_args)  # everything that the command does before it runs
    for arguments in commands(page):
        assert main(arguments) == 0, f"anysplade {shlex.join(arguments)}: {capsys.readouterr().err}"


def test_commands_are_read_from_all_code(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        '`anysplade demo` and `anysplade size\nM --documents 1M`\n\n    anysplade search index "a b" # all\n\n'
        "```sh\n.venv/bin/anysplade train A B \\\n    --no-such-option &\nanysplade train ...\n```\n"
    )
    found = sorted(commands(page))
    assert found == [
        ["demo", "--help"],
        ["search", "index", "a b"],
        ["size", "M", "--documents", "1M"],
        ["train", "--help"],
        ["train", "A", "B", "--no-such-option"],
    ]
    monkeypatch.setattr(App, "__call__", App.parse_args)
    assert [main(arguments) for arguments in found] == [0, 0, 0, 0, 2]
    assert main(["no-such-command", "--help"]) == 2


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: anysplade\.(\w+)$", text, re.MULTILINE)) == sorted(set(anysplade.__all__) - {"__version__"})


def test_the_site_is_built_without_a_broken_link(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))
    elsewhere = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=.(?:https?:)?//")
    assert [page for page in pages if elsewhere.search(page.read_text(encoding="utf-8"))] == []
