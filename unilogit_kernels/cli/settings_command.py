"""Commands whose options are the settings of a run: the one place where the two meet."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from unilogit_kernels.unlearning.settings import (
    METHOD_OPTIONS,
    OF_FINETUNING,
    ForgettingSettings,
    HeadSettings,
    Settings,
    option_of,
    settings_of,
)

_ARGS = "--args."
_BY_NAME = {"method_parameters": "--method-parameter", "args": f"{_ARGS}NAME"}
"""Options of settings that are given by name, where they are not the field's own."""
_PANELS = (
    (ForgettingSettings, "What is forgotten and kept"),
    (HeadSettings, "How losses are computed"),
)
_HINTS = typing.get_type_hints(Settings)

_COMMAND_OPTIONS: dict[str, Any] = {
    "config": Annotated[
        Path | None,
        typer.Option(help="YAML file of settings, as --print-config shows them; options go first."),
    ],
    "print_config": Annotated[
        bool, typer.Option("--print-config", help="Print the settings of the run as YAML, and end.")
    ],
    "resume": Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output.")
    ],
}


class SettingsCommand(TyperCommand):
    """A command that takes `--args.NAME VALUE` for any NAME."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give each name and its value to the option that collects them."""
        return super().parse_args(ctx, list(_collected(args)))


def _collected(args: Sequence[str]) -> typing.Iterator[str]:
    position = 0
    while position < len(args):
        word = args[position]
        position += 1
        if word == "--":
            yield from args[position - 1 :]
            return
        if not word.startswith(_ARGS):
            yield word
            continue
        name, separator, value = word.removeprefix(_ARGS).partition("=")
        if not separator:
            value = "true"  # A flag, where no value follows.
            if position < len(args) and not args[position].startswith("--"):
                value = args[position]
                position += 1
        yield from (_BY_NAME["args"], f"{name}={value}")


def takes_settings(task: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a function that takes a run's settings be a command that has an option for each.

    Args:
        task: a key of `settings.TASKS`.

    Returns:
        A decorator. The function is called with the settings and with whether to resume, and its
        docstring is the command's help.
    """

    def decorate(run: Callable[[Settings, bool], None]) -> Callable[..., None]:
        def command(ctx: typer.Context, **given: Any) -> None:
            from unilogit_kernels.cli.console import say
            from unilogit_kernels.unlearning.checks import check_settings
            from unilogit_kernels.unlearning.config import as_yaml, make_settings

            asked = {
                name: value
                for name, value in given.items()
                if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
            }
            for name in _COMMAND_OPTIONS:
                asked.pop(name, None)
            settings = make_settings(task, _by_field(asked), given["config"])
            if given["print_config"]:
                check_settings(settings)
                say(as_yaml(settings).rstrip("\n"))
                return
            run(settings, given["resume"])

        parameters = _parameters(task)
        command.__doc__, command.__name__ = run.__doc__, run.__name__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate


def _parameters(task: str) -> list[inspect.Parameter]:
    """Of the command's function, which typer makes options of."""
    found: dict[str, tuple[Any, Any]] = {"ctx": (inspect.Parameter.empty, typer.Context)}
    for known in settings_of(task):
        found[known.name] = _default(known, task), _annotation(known)
        if known.name == "method_parameters":
            for name, help in METHOD_OPTIONS.items():
                option = typer.Option(help=help, rich_help_panel=_panel(known))
                found[name] = None, Annotated[float | None, option]
    for name, annotation in _COMMAND_OPTIONS.items():
        found[name] = None if name == "config" else False, annotation
    return [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )
        for name, (default, annotation) in found.items()
    ]


def _default(known: Field[Any], task: str) -> Any:
    if task == "finetune" and known.name in OF_FINETUNING:
        return OF_FINETUNING[known.name]
    return None if known.default in (MISSING, ()) else known.default


def _annotation(known: Field[Any]) -> Any:
    hint, names, help = _HINTS[known.name], [option_of(known)], str(known.metadata["help"])
    metavar = None
    if known.default is MISSING and known.default_factory is MISSING:
        help += " Required, here or in --config."
        hint = hint | None
    if typing.get_origin(hint) is dict:
        names, hint = [_BY_NAME.get(known.name, names[0])], list[str] | None
        metavar = "VALUE" if known.name == "args" else "NAME=VALUE"
    elif typing.get_origin(hint) is tuple:
        hint = list[typing.get_args(hint)[0]] | None  # type: ignore[misc]
    elif bool in (hint, *typing.get_args(hint)):
        names = [f"{names[0]}/--no-{names[0].removeprefix('--')}"]
    return Annotated[
        hint, typer.Option(*names, help=help, metavar=metavar, rich_help_panel=_panel(known))
    ]


def _panel(known: Field[Any]) -> str | None:
    return next((said for of, said in _PANELS if known.name in of.__dataclass_fields__), None)


def _by_field(asked: dict[str, Any]) -> dict[str, Any]:
    """What the command line gives, by the names of the fields of `Settings`."""
    from unilogit_kernels.unlearning.encoding import parse_template_arguments

    found = {name: value for name, value in asked.items() if name not in METHOD_OPTIONS}
    of_method = {name: asked[name] for name in METHOD_OPTIONS if name in asked}
    if of_method or "method_parameters" in asked:
        given = asked.get("method_parameters", [])
        found["method_parameters"] = _named("--method-parameter", given, "NUMBER", of_method)
    if "template_arguments" in asked:
        found["template_arguments"] = parse_template_arguments(asked["template_arguments"])
    if "args" in asked:
        found["args"] = _named("--args.NAME", asked["args"], "VALUE", {})
    return found


def _named(option: str, given: list[str], what: str, before: dict[str, Any]) -> dict[str, Any]:
    """What an option that may be repeated gives as `NAME=VALUE`."""
    from unilogit_kernels.unlearning.errors import RunError

    found = dict(before)
    for item in given:
        name, separator, value = item.partition("=")
        if not separator or not name:
            raise RunError(f"{option} takes NAME={what}, got {item!r}")
        if name in found:
            raise RunError(f"{option} {item!r}: {name} is given twice")
        found[name] = value
        if what == "NUMBER":
            try:
                found[name] = float(value)
            except ValueError:
                raise RunError(f"{option} takes NAME={what}, got {item!r}") from None
    return found
