"""Hooks of mkdocs: pages that lie outside of docs/, and links to files that are no pages.

A link in a page is one between files of the repository, as GitHub reads it. The site has some of these files as pages;
the others are linked on GitHub.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parent
_PAGES = {"index.md": "README.md", "recipes.md": "recipes/README.md", "results.md": "results/README.md"}
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere in the repository."""
    for page, source in _PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(_ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository become links to pages of the site, or to GitHub."""
    uris = {_repository_path(file): file.src_uri for file in files}
    here = _repository_path(page.file)

    def target(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[1]))
        if path in uris:
            return posixpath.relpath(uris[path], posixpath.dirname(page.file.src_uri) or ".")
        if not (_ROOT / path).exists():
            return match[1]  # mkdocs reports it
        return f"{config.repo_url}/blob/main/{path}"

    return _LINK.sub(target, markdown)


def _repository_path(file: File) -> str:
    return _PAGES.get(file.src_uri, f"docs/{file.src_uri}")
