"""The commands by name; the module of one is imported when it is run, not to list it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from unilogit_kernels import __version__
from unilogit_kernels.cli.console import reporting_errors
from unilogit_kernels.cli.settings_command import SettingsCommand


class LazyCommand(NamedTuple):
    """A command that has not been imported.

    Attributes:
        module: Where it is a function of the command's name.
        help: The first line of that function's docstring.
        settings: What `typer.Typer.command` takes beside.
    """

    module: str
    help: str
    settings: Mapping[str, Any] = MappingProxyType({})


COMMANDS = {
    "unlearn": LazyCommand(
        "unilogit_kernels.cli.unlearn",
        "Make a model forget some rows and keep the others.",
        {"cls": SettingsCommand},
    ),
    "finetune": LazyCommand(
        "unilogit_kernels.cli.finetune",
        "Teach a model rows by cross-entropy, as for a model that never saw those to forget.",
        {"cls": SettingsCommand},
    ),
    "evaluate": LazyCommand(
        "unilogit_kernels.cli.evaluate",
        "Measure how well a model knows sets of rows, and with --output all that they allow.",
    ),
    "compare": LazyCommand(
        "unilogit_kernels.cli.compare",
        "Run methods beside each other on one data set, as a plan file says, and draw a report.",
    ),
    "report": LazyCommand(
        "unilogit_kernels.cli.report",
        "Draw the report of a comparison again, or of as much of it as there is.",
    ),
    "dataset": LazyCommand(
        "unilogit_kernels.cli.dataset",
        "Write a made-up benchmark of TOFU's shape: sellers to forget and to keep, general facts.",
    ),
    "methods": LazyCommand(
        "unilogit_kernels.cli.methods", "List the losses by name: parameters, needs and papers."
    ),
    "doctor": LazyCommand(
        "unilogit_kernels.cli.diagnosis",
        "Show versions, devices, which backends can run here, and what each extra gives.",
        # It parses its own, as it must do where typer is not installed.
        {"context_settings": {"ignore_unknown_options": True}, "add_help_option": False},
    ),
    "bench": LazyCommand(
        "unilogit_kernels.cli.bench",
        "Time this package beside its peers, with errors and memory in the same row.",
    ),
}
"""A new command is an entry here, and a function whose parameters typer reads."""


def load(name: str) -> Callable[..., Any]:
    """The function of a command."""
    function: Callable[..., Any] = getattr(importlib.import_module(COMMANDS[name].module), name)
    return function


class _Group(TyperGroup):
    """Knows every command by a stand-in, and takes the real one for the one that is run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Import the command that is asked for."""
        if args and args[0] in COMMANDS:
            alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            of_command = alone.command(args[0], **COMMANDS[args[0]].settings)
            of_command(reporting_errors()(load(args[0])))
            self.commands[args[0]] = typer.main.get_command(alone)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="unilogit",
    cls=_Group,
    help="Fused, memory-flat unlearning of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unilogit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Options of no command."""


def _stand_in() -> None:
    """Has only the help of a command; `_Group` replaces it before it is called."""


for _name, _command in COMMANDS.items():
    app.command(_name, help=_command.help)(_stand_in)
