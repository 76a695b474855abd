"""Run cells in parallel processes."""

import logging
import multiprocessing
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from anysplade._common.progress import bar
from anysplade._common.workers import devices_of_workers, take_device
from anysplade.errors import AnyspladeError, worker_died
from anysplade.study.cells import CellRecord, read_cells, run_cell
from anysplade.study.plan import Cell

logger = logging.getLogger(__name__)


def run_cells(
    cells: Sequence[Cell], collections: Sequence[str], out: Path, workers: int, progress: bool = False
) -> tuple[dict[str, CellRecord], dict[str, str]]:
    """Run the cells that are missing in a folder; returns all records, and the messages of failed cells, both by hash."""
    done = read_cells(out, cells, collections)
    missing = list({cell.hash: cell for cell in cells if cell.hash not in done}.values())
    failed = _run_missing(missing, collections, out, workers, progress) if missing else {}
    return read_cells(out, cells, collections), failed


def default_workers() -> int:
    """One per GPU, or one per core."""
    return torch.cuda.device_count() or os.cpu_count() or 1


def _run_missing(missing: Sequence[Cell], collections: Sequence[str], out: Path, workers: int, progress: bool) -> dict[str, str]:
    failed: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    devices = devices_of_workers(context, workers)
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(min(workers, len(missing)), context, _begin_worker, (devices, threads)) as pool:
        futures = {pool.submit(run_cell, cell, collections, out): cell for cell in missing}
        with bar("cells", "cell", len(futures), progress) as shown:
            for future in as_completed(futures):
                cell = futures[future]
                try:
                    future.result()
                except BrokenProcessPool as error:
                    raise worker_died(out) from error
                except AnyspladeError as error:
                    failed[cell.hash] = str(error)
                    logger.warning("a cell failed (%s, %s): %s", cell.backbone, dict(cell.options), error)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
                shown.update()
    return failed


def _begin_worker(devices: Any, threads: int) -> None:
    take_device(devices)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)
    for library in ("sentence_transformers", "anysplade"):  # trainings run side by side; their findings are in the records
        logging.getLogger(library).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
