"""`unilogit dataset`: made-up data of TOFU's shape, to try a whole evaluation on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unilogit_kernels.unlearning.demo.tofu_shape import make_tofu_shaped, write_tofu_shaped
from unilogit_kernels.unlearning.errors import RunError, check_writable, reading


def dataset(
    output: Annotated[Path, typer.Option(help="Directory for the files.")],
    seed: Annotated[int, typer.Option(help="What the data is a function of.")] = 0,
    sellers: Annotated[int, typer.Option(help="Sellers that the starting model knows.")] = 80,
    forget_sellers: Annotated[int, typer.Option(help="Of them, how many to forget.")] = 20,
    holdout_sellers: Annotated[int, typer.Option(help="Sellers no model is trained on.")] = 20,
) -> None:
    """Write a made-up benchmark of TOFU's shape: sellers to forget and to keep, general facts."""
    check_writable(output, folder=True, option="--output")
    if output.is_dir() and any(output.iterdir()):
        raise RunError(f"--output {output}: is not empty; choose another directory")
    with reading("dataset"):
        tables = make_tofu_shaped(
            seed,
            sellers=sellers,
            forget_sellers=forget_sellers,
            holdout_sellers=holdout_sellers,
        )
    write_tofu_shaped(tables, output)
    for name, rows in tables.items():
        typer.echo(f"{name}: {len(rows)} rows")
    share = 100 * forget_sellers // sellers
    typer.echo(f"read it back by --benchmark tofu:forget{share:02d} --data-dir {output}")
