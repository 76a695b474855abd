"""One of two processes that train together: backbone, meeting file, fused or not, output."""

import os
import sys
from datetime import timedelta

import torch
from datasets import Dataset
from sentence_transformers import SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss

from anysplade import load_encoder
from tiny import WORDS


def main() -> None:
    backbone, meeting, fused, out = sys.argv[1:]
    rank = int(os.environ["RANK"])
    # They meet by a file, so no port can be taken; the trainer uses the group that it finds.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    encoder = load_encoder(backbone, k=2, shift=0.5, fused=fused == "1")
    columns = {"query": WORDS[:32], "positive": [" ".join(WORDS[i : i + 5]) for i in range(32)]}
    loss = SpladeLoss(encoder, SparseMultipleNegativesRankingLoss(encoder), 1e-3, 1e-3)
    arguments = SparseEncoderTrainingArguments(
        out, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True, ddp_backend="gloo", save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    SparseEncoderTrainer(encoder, arguments, Dataset.from_dict(columns), loss=loss).train()
    torch.save(encoder.state_dict(), f"{out}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
