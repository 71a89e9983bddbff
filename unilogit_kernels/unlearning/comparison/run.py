"""A comparison from a plan to files: `unilogit compare`. What is finished is never done again."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from unilogit_kernels.unlearning.comparison.cell import (
    GOLDEN,
    STARTING,
    check_measures,
    run_cell,
    run_model,
)
from unilogit_kernels.unlearning.comparison.folder import AUDIT, CELLS, PLAN, read_cell
from unilogit_kernels.unlearning.comparison.plan import Plan
from unilogit_kernels.unlearning.comparison.summary import read_summary
from unilogit_kernels.unlearning.errors import RunError, check_writable, one_line, reading
from unilogit_kernels.unlearning.measuring.audit import audit_record
from unilogit_kernels.unlearning.measuring.store import write_json
from unilogit_kernels.unlearning.processes import check_alone, on_cpu

_ENDED = "the process of this cell ended, as it does for want of memory"

Note = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        finished: cells that there are, failed ones among them.
        new: of these, how many this call ran.
        failed: names and errors of those that failed.
    """

    finished: int
    new: int
    failed: Mapping[str, str]


def compare(
    plan: Plan,
    folder: Path,
    *,
    processes: int = 1,
    retry: bool = False,
    note: Note = print,
) -> Outcome:
    """Run every cell of a plan that is not finished.

    A cell is finished once its file is written, which is done at once; one that was interrupted
    starts anew. A cell that fails is finished, too: its file holds the error.

    Args:
        plan: what is compared.
        folder: for everything. Another plan may go on in it, with other methods, learning rates,
            weights, seeds and rules of choice, but with the same of all that cells share.
        processes: how many cells run at once, each in a process with its share of the cores, and
            with a GPU of its own as far as there are any.
        retry: run failed cells again.
        note: is told what is done.

    Returns:
        How many cells there are now.

    Raises:
        RunError: the plan or the folder does not fit.
    """
    check_alone("unilogit compare")
    if processes < 1:
        raise RunError(f"processes must be at least 1, got {processes}")
    check_writable(folder, folder=True, option="--output")
    shared = plan.shared()
    check_measures(plan.choose.by, shared, folder)
    _check_same(folder, shared)
    cells = plan.cells()
    _record(plan, cells, folder)
    models: dict[str, Any] = {}
    for role in (GOLDEN, STARTING):
        golden = models.get(GOLDEN, {}).get("logs")
        models[role] = _model(role, shared, folder, golden, note)
    write_json(folder / AUDIT, _audit(plan, models))
    run = partial(
        _run_missing, shared=shared, folder=folder, models=models, processes=processes, note=note
    )
    new = run(cells, retry=retry)
    if plan.count() > len(cells):
        chosen = {each.title: each.chosen for each in read_summary(folder).methods}
        note(f"seeds {plan.choosing_seeds} chose; the others run the chosen settings")
        cells = plan.cells({title: each for title, each in chosen.items() if each is not None})
        _record(plan, cells, folder)
        new += run([c for c in cells if c["seed"] not in plan.choosing_seeds], retry=retry)
    results = {cell["name"]: read_cell(folder, cell) or {} for cell in cells}
    failed = {name: found["error"] for name, found in results.items() if "error" in found}
    return Outcome(len(results), new, failed)


def _record(plan: Plan, cells: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write what `report` draws by."""
    drawn = {
        "title": plan.title,
        "note": plan.note,
        "cells": cells,
        "by": list(plan.choose.by),
        "choosing_seeds": list(plan.choosing_seeds),
        "samples": plan.answers.samples,
    }
    write_json(folder / PLAN, {"shared": plan.shared(), "plan": drawn})


def _check_same(folder: Path, shared: Mapping[str, Any]) -> None:
    path = folder / PLAN
    if not path.exists():
        return
    with reading(f"{path}: no plan of a comparison; choose another directory"):
        before = json.loads(path.read_text(encoding="utf-8"))["shared"]
    now = json.loads(json.dumps(shared))
    changed = [
        f"{part}.{name} ({before.get(part, {}).get(name)!r} -> {value!r})"
        for part, values in now.items()
        for name, value in values.items()
        if before.get(part, {}).get(name) != value
    ]
    if changed:
        raise RunError(
            f"{folder} holds a comparison with other {', '.join(changed)}, which all of its cells "
            "share: choose another directory"
        )


def _model(
    role: str, shared: Mapping[str, Any], folder: Path, golden: Any, note: Note
) -> dict[str, Any]:
    path = folder / f"{role}.json"
    if not path.exists():
        note(f"{role} model")
        write_json(path, run_model(role, {"shared": shared}, folder, golden))
    with reading(f"{path}: no results of a model; delete it to have it measured again"):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if shared["model"][role] is None:
        found["source"] = str(folder / role)  # The folder may have been moved.
    return found


def _audit(plan: Plan, models: Mapping[str, Any]) -> dict[str, Any]:
    golden = models[GOLDEN]
    inputs = dict(golden["inputs"])
    for role, model in models.items():
        inputs[f"{role} weights"] = model["inputs"]["weights"]
    del inputs["weights"]
    record = audit_record(
        settings=plan.shared(),
        inputs=inputs,
        files={},
        model=plan.model.starting or f"made of {plan.model.base}",
        found={},
        missing=golden["final"]["not_computed"],
    )
    return {name: value for name, value in record.items() if name not in ("metrics", "written")}


def _run_missing(
    planned: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    folder: Path,
    models: Mapping[str, Any],
    processes: int,
    note: Note,
    *,
    retry: bool,
) -> int:
    """Run cells that are not finished, one after the other or several at once; say how many.

    Each is written when it is done.
    """
    found = {cell["name"]: read_cell(folder, cell) for cell in planned}
    again = [c for c in planned if retry and "error" in (found[c["name"]] or {})]
    cells = [cell for cell in planned if found[cell["name"]] is None or cell in again]
    if len(cells) < len(planned):
        note(f"{len(planned) - len(cells)} of {len(planned)} cells are finished already")
    done = 0

    def keep(cell: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        nonlocal done
        done += 1
        write_json(folder / CELLS / f"{cell['name']}.json", {"settings": cell, **found})
        note(f"{done} of {len(cells)}: {cell['name']}: {_told(found)}")

    if processes == 1 or len(cells) <= 1:
        for cell in cells:
            keep(cell, _tried({**cell, "shared": shared}, folder, models))
        return len(cells)
    given = [{**cell, "shared": shared} for cell in cells]
    for number, result in in_processes(
        partial(_tried, folder=folder, models=models), given, processes
    ):
        keep(cells[number], result)
    return len(cells)


def in_processes(
    work: Callable[[Any], dict[str, Any]], items: Sequence[Any], processes: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Do something with each item, in several processes at once.

    Each of them has an executor of its own, so that the end of one is that of its item alone.

    Args:
        work: a function that can be pickled.
        items: to do it with.
        processes: at most so many at once.

    Yields:
        Positions of items and results, as they are done; an `error` where a process ended.
    """
    processes, gpus = min(processes, len(items)), _gpus()
    left: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    for numbered in enumerate(items):
        left.put(numbered)
    done: queue.SimpleQueue[tuple[int, dict[str, Any]] | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()

    def start(number: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, context, _begin, (number, processes, gpus))

    def serve(number: int) -> None:
        executor = start(number)
        try:
            while not stopped.is_set():
                try:
                    position, item = left.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((position, executor.submit(work, item).result()))
                except BrokenProcessPool:
                    done.put((position, {"error": _ENDED}))
                    executor.shutdown(wait=False)
                    executor = start(number)
        except BaseException as error:
            done.put(error)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    for number in range(processes):
        threading.Thread(target=serve, args=(number,), daemon=True).start()
    try:
        for _ in items:
            found = done.get()
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stopped.set()


def _begin(number: int, processes: int, gpus: list[str]) -> None:
    """Give a process its share: of the cores, and one of the GPUs, before torch looks for them."""
    # Whoever starts the comparison again must not find this one's cells still under way.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    transformers_logging.disable_progress_bar()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls those that this process sees."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if on_cpu() or not torch.cuda.is_available():
        return []
    return told.split(",") if told else [str(n) for n in range(torch.cuda.device_count())]


def _tried(settings: Mapping[str, Any], folder: Path, models: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a cell, or its error: one that fails leaves the others alone."""
    try:
        return run_cell(settings, folder, models)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {one_line(error)}"}


def _told(found: Mapping[str, Any]) -> str:
    if "error" in found:
        return f"failed: {found['error']}"
    reached = "the target" if found["matched"] is not None else "no target"
    return f"{reached} after {found['cost']['steps']} steps, {found['cost']['seconds']:.1f} s"
