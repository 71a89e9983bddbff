"""Settings from a YAML file and the command line, and back to a file."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import type_validator
from transformers import TrainingArguments

from unilogit_kernels import __version__
from unilogit_kernels.unlearning.errors import RunError, reading
from unilogit_kernels.unlearning.methods import default_retain_loss, default_stop
from unilogit_kernels.unlearning.settings import (
    OWN_ARGUMENTS,
    Settings,
    option_of,
    plain,
    settings_of,
)

FILE = "settings.yaml"
"""The settings of a run, in its output folder."""

_ARGS = "args"
_REFUSED_ARGUMENTS = {
    "output_dir": "checkpoints lie in --output",
    "resume_from_checkpoint": "a run goes on by --resume",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "it is read by scripts of Hugging Face"),
}
"""Of `TrainingArguments`, what the command line has no place for, and why."""


def make_settings(task: str, line: Mapping[str, Any], file: Path | None) -> Settings:
    """The settings of a run: the command line's, else the file's, else the defaults.

    Of settings that are given by name (`args`, `method_parameters`, `template_arguments`) each
    name is one of its own.

    Args:
        task: a key of `settings.TASKS`.
        line: what the command line gives, by the names of the fields.
        file: YAML, or None.

    Raises:
        RunError: the file cannot be read, there is no such setting, a value is of another type, or
            it is not said what model to take and where to write.
    """
    given = {} if file is None else _typed(task, _read(file), f"{file}: ")
    for name, value in _typed(task, line, "").items():
        both = isinstance(value, dict) and isinstance(given.get(name), dict)
        given[name] = {**given[name], **value} if both else value
    for known in settings_of(task):
        required = known.default is known.default_factory is dataclasses.MISSING
        if required and known.name not in given:
            raise RunError(
                f"{option_of(known)} is missing, and no --config names it: {known.metadata['help']}"
            )
    if task == "finetune":
        return Settings.finetuning(**given)
    settings = Settings(**given)
    settings.stop_at = settings.stop_at or default_stop(settings.method)
    settings.retain_loss = settings.retain_loss or default_retain_loss(settings.method)
    return settings


def as_yaml(settings: Settings) -> str:
    """What `--config` reads again: every setting that the run's command has."""
    values = {each.name: plain(getattr(settings, each.name)) for each in settings_of(settings.task)}
    head = f"# unilogit {settings.task} --config THIS_FILE  (unilogit-kernels {__version__})\n"
    return f"{head}{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"


def check_handed_on(args: Mapping[str, Any]) -> None:
    """See that arguments go to the Trainer as they are, and are of its types.

    Raises:
        RunError: there is no such argument, a setting has its place, or the value does not fit.
    """
    for name, value in args.items():
        if name in OWN_ARGUMENTS:
            raise RunError(f"args.{name} is the setting {OWN_ARGUMENTS[name]}: give it there")
        _argument(name, value, "")


def _read(file: Path) -> dict[str, Any]:
    with reading(f"--config {file}"):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise RunError(f"--config {file}: holds no settings by name")
    return content


def _typed(task: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values of the types of their fields; arguments of the Trainer that are settings at these."""
    known = {each.name: each for each in settings_of(task)}
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            options = {option_of(each).removeprefix("--"): each.name for each in known.values()}
            hint = f"; --{name} is {options[name]} in a file" if name in options else ""
            raise RunError(f"{where}there is no setting {name!r}{hint or _nearest(name, known)}")
        found[name] = convert(f"{where}{name}", value, _hints(Settings)[name])
    args: dict[str, Any] = {}
    for name, value in found.pop(_ARGS, {}).items():
        own = OWN_ARGUMENTS.get(name)
        if own is None:
            args[name] = _argument(name, value, where)
            continue
        if own in found:
            raise RunError(f"{where}args.{name} is {own}, which is given, too: leave out one")
        found[own] = convert(f"{where}args.{name}", value, _hints(Settings)[own])
    return {**found, _ARGS: args} if args else found


def _argument(name: str, value: Any, where: str) -> Any:
    """The value of an argument that is handed on."""
    known = {each.name for each in dataclasses.fields(TrainingArguments)}
    if name in known - _REFUSED_ARGUMENTS.keys():
        return convert(f"{where}args.{name}", value, _hints(TrainingArguments)[name])
    if name in _REFUSED_ARGUMENTS:
        raise RunError(f"{where}args.{name} has no place here: {_REFUSED_ARGUMENTS[name]}")
    of_settings = {each.name: option_of(each) for each in settings_of("unlearn")}
    if name in of_settings:
        raise RunError(f"{where}args.{name} is no argument of the Trainer's: {of_settings[name]}")
    raise RunError(f"{where}TrainingArguments has no field {name!r}{_nearest(name, known)}")


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; the nearest is {near[0]!r}" if near else ""


@functools.cache
def _hints(of: type) -> dict[str, Any]:
    return typing.get_type_hints(of)


def convert(what: str, value: Any, hint: Any) -> Any:
    """A value as its type hint has it; a text may be YAML, and a list a tuple.

    Args:
        what: the value's name, for the message.
        value: of YAML, of the command line, or of Python.
        hint: a type.

    Raises:
        RunError: it is of another type.

    Example:
        >>> convert("lr", "1e-5", float), convert("run_name", "1e-5", str | None)
        (1e-05, '1e-5')
    """
    parts = typing.get_args(hint) if _is_union(hint) else (hint,)
    for part in parts:
        of_parts = typing.get_args(part)
        if isinstance(value, (list, tuple)) and typing.get_origin(part) is tuple:
            return tuple(convert(what, each, of_parts[0]) for each in value)
        named = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        if named and typing.get_origin(part) is dict and of_parts[1] is not Any:
            return {
                name: convert(f"{what}.{name}", each, of_parts[1]) for name, each in value.items()
            }
    for candidate in _candidates(value, hint):
        if any(_fits(what, candidate, part) for part in parts):
            return candidate
    raise RunError(f"{what} must be {_said(hint)}, got {value!r}")


def _fits(what: str, value: Any, part: Any) -> bool:
    try:
        type_validator(what, value, part)
    except TypeError:
        return False
    return True


def _candidates(value: Any, hint: Any) -> Iterator[Any]:
    parts = typing.get_args(hint) if _is_union(hint) else (hint,)
    if isinstance(value, str):
        with suppress(yaml.YAMLError, ValueError, RecursionError):
            parsed = yaml.safe_load(value)
            # An empty text is none, and "no" of a setting that takes texts is what it says.
            if value.strip() and not isinstance(parsed, str):
                yield from _candidates(parsed, hint)
        if float in parts:  # YAML 1.1 takes 1e-5 for a text.
            with suppress(ValueError):
                yield float(value)
        if Path in parts:
            yield Path(value)
    yield value
    if float in parts and isinstance(value, int) and not isinstance(value, bool):
        with suppress(OverflowError):
            yield float(value)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


_WORDS: dict[Any, str] = {
    **{str: "text", bool: "true or false", int: "an integer", float: "a number"},
    **{list: "a list", tuple: "a list", dict: "a mapping", types.NoneType: "nothing"},
}


def _said(hint: Any) -> str:
    parts = typing.get_args(hint) if _is_union(hint) else (hint,)
    kinds = [typing.get_origin(each) or each for each in parts]
    words = [_WORDS.get(each) or getattr(each, "__name__", str(each)) for each in kinds]
    return " or ".join(dict.fromkeys(words))
