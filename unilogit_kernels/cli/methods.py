"""`unilogit methods`."""

from __future__ import annotations

import json as json_format
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from unilogit_kernels.unlearning.errors import RunError
from unilogit_kernels.unlearning.methods import Method, MethodError, method_names


def methods(
    name: Annotated[
        str | None, typer.Argument(help="A method, to read all about it. Default: list all.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """List the losses by name: parameters, needs and papers."""
    try:
        chosen = [Method(each) for each in ([name] if name else method_names())]
    except MethodError as error:
        raise RunError(str(error)) from error
    console = Console(highlight=False)
    if json:
        typer.echo(json_format.dumps([_described(method) for method in chosen], indent=2))
    elif name:
        parameters = _parameters(chosen[0]) or "none"
        typer.echo(f"{name}\nParameters: {parameters}\nNeeds: {_needs(chosen[0]) or 'nothing'}\n")
        typer.echo(chosen[0].description)
    else:
        table = Table(box=box.SIMPLE)
        table.add_column("Method", no_wrap=True)
        for column in ("Parameters", "Needs", "What it is"):
            table.add_column(column)
        for method in chosen:
            what = method.description.partition("\n")[0].replace("`", "")
            table.add_row(method.name, _parameters(method), _needs(method), what)
        console.print(table)
        console.print(
            "unilogit unlearn --method NAME --method-parameter PARAMETER=NUMBER; "
            "unilogit methods NAME says more of one.",
            markup=False,
        )


def _described(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "parameters": dict(method.defaults),
        "needs": _needs(method),
        "description": method.description,
    }


def _parameters(method: Method) -> str:
    return ", ".join(
        f"{name} by the model" if value is None else f"{name}={value:g}"
        for name, value in method.defaults.items()
    )


def _needs(method: Method) -> str:
    """What a run keeps or asks for beside the rows to forget and to keep."""
    needs = {
        "the starting model": method.needs_teacher,
        "the starting model's log p": method.needs_reference,
        "refusals": method.needs_refusals,
    }
    return ", ".join(what for what, needed in needs.items() if needed)
