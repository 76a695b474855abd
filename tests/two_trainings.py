"""One of two processes that train by one config after the other: a JSON file with the options of each, and the meeting file."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch

from anysplade import TrainingConfig, train
from processes import SECONDS


def main() -> None:
    options, meeting = sys.argv[1:]
    # They meet by a file, so no port can be taken; training uses the group that it finds. One of them prepares while the other
    # waits, which takes long on a machine that others use.
    rank, limit = int(os.environ["RANK"]), timedelta(seconds=SECONDS)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=limit)
    for config in json.loads(Path(options).read_text()):
        train(TrainingConfig(**config))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
