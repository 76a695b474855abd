"""``python -m anysplade``, which is also how ``torchrun -m anysplade`` starts it."""

from anysplade.cli.app import run

run()
