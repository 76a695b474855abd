"""Two tiny masked language models, bundled: see README.md in this folder."""

from pathlib import Path

from anysplade.data.names import BACKBONES

BUNDLED = {name: Path(__file__).parent / name for name in BACKBONES}
