"""AltPO's alternates (Mekala et al. 2024, arXiv 2409.13474): what to answer instead, row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from unilogit_kernels.unlearning.rows import DataError, Row


def with_alternates(forget: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Each row to forget once for each of its alternates, and the rows of these.

    Args:
        forget: rows, each with at least one alternate.

    Returns:
        Rows to forget, and as many rows with the same prompts that answer otherwise.

    Raises:
        DataError: a row has no prompt or no alternate.
    """
    originals, alternates = [], []
    for row in forget:
        if not row.prompt or not row.alternates:
            lacks = "an alternate" if row.prompt else "a prompt"
            raise DataError(
                f"{row.source}: a row without {lacks} has nothing to answer instead; method altpo "
                'takes the field "alternate", a text or a list of texts'
            )
        # As the answer it stands for: most follow the prompt after a space.
        space = row.completion[: len(row.completion) - len(row.completion.lstrip())]
        for number, alternate in enumerate(row.alternates, start=1):
            originals.append(row)
            alternates.append(
                dataclasses.replace(
                    row,
                    completion=space + alternate.strip(),
                    key=None,
                    source=f"{row.source}, alternate {number}",
                )
            )
    return originals, alternates
