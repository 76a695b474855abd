"""Two tiny masked language models, bundled: see README.md in this folder."""

from pathlib import Path

BUNDLED = {name: Path(__file__).parent / name for name in ("bert-tiny", "modernbert-tiny")}
