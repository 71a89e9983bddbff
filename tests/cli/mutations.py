"""Inputs of a run, broken in one place each, and what an error about them must speak of."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OPTIONS = {
    "--epochs": "1",
    "--batch-size": "3",
    "--lr": "1e-3",
    "--max-length": "64",
    "--checkpoint-steps": "50",
    "--forget-weight": "0.1",
    "--retain-weight": "1",
    "--retain-per-forget": "1",
    "--warmup-steps": "0",
    "--gradient-accumulation": "1",
    "--seed": "0",
    "--stop-at": "none",
}
"""Of the run that is broken; one short step."""

OPTIONAL = (
    *("--train-layers", "--dtype", "--method", "--retain-loss"),
    *("--max-retain-loss-rise", "--check-steps", "--report-rows", "--save-dtype"),
    *("--label-smoothing", "--z-loss", "--dual-step-size", "--retain-loss-target"),
    *("--dual-update", "--dual-warmup-epochs", "--method-parameter"),
)
"""Without a value in the run as it should be."""

METHODS = {
    "npo": ("--beta",),
    "wga": ("--alpha",),
    "satimp": ("--beta1", "--beta2"),
    "tnpo": ("--alpha", "--beta"),
    "simnpo": ("--beta", "--delta"),
    "self_undial": ("--gamma",),
}
NUMBERS = (
    *("nan", "inf", "-inf", "1e400", "-1", "0", "-0.0", "1e-400", "1e300", "0.5", "1.5", "2"),
    *("4294967296", "99999999999999999999", "one", "", "0x1", "1_0", "true"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 0.5, float("nan"), float("inf"), 10**400, "", " ", "x", "\ud800"),
    *("a\u2028b", "a\x00b", "</s>", "{{ x }}", [], {}, [1], {"a": 1}, [["x"]], "日本", "é" * 300),
)
SIZES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    3,
    0.5,
    "",
    "x",
    [],
    {},
    [1],
    {"a": 1},
    float("nan"),
)
TEMPLATES = (
    *(
        "{{ raise_exception('no users') }}",
        "{% for",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "",
    ),
    *("{{ messages[0].role.nothing.at.all }}", "{% include 'x' %}", "{{ strftime_now() }}", "{{"),
    *("{{ messages | nofilter }}", "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}", "x"),
    *("{{ messages[0].content * 99 }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
)
WRONG_SETS = ("a", "=forget.jsonl", "a=", "a=model", "a=nowhere")
BYTES = (
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b'"', b"{", b"}", b"\\", b"\n", b"\r\n", b"\xe2\x80\xa8"),
    *(b"\\ud800", b"[" * 3000, b"9" * 5000, b"NaN", b"null", b","),
)


@dataclass
class Case:
    """A command in a folder of its own.

    Attributes:
        folder: with `model`, `forget.jsonl`, `retain.jsonl`, `refusals.txt` and, of an unfinished
            run, `started`.
        options: the command's, by name.
        flags: more of them, without a value.
        command: `"unlearn"` or `"evaluate"`.
        about: what an error may speak of.
        broken: what was done, for messages.
    """

    folder: Path
    options: dict[str, str]
    flags: list[str] = field(default_factory=list)
    command: str = "unlearn"
    about: tuple[str, ...] = ()
    broken: str = ""

    @property
    def line(self) -> list[str]:
        """The arguments of the command."""
        return [
            self.command,
            *self.flags,
            *(part for pair in self.options.items() for part in pair),
        ]


def bend_bytes(path: Path, rng: random.Random) -> None:
    """Change, cut or insert a few bytes of a file."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(5):
            case 0:
                content[at:at] = rng.choice(BYTES)
            case 1:
                del content[at : at + rng.choice((1, 2, 40))]
            case 2:
                content[at : at + 1] = bytes([rng.randrange(256)])
            case 3:
                content[at:at] = content[at : at + 30]
            case 4:
                del content[at:]
    path.write_bytes(bytes(content))


def bend_value(value: Any, rng: random.Random, values: tuple[Any, ...]) -> Any:
    """Replace, remove or rename one place of a JSON value."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.05:
        return rng.choice(values)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    match rng.randrange(8):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[f"{key}s"] = value.pop(key)
        case _:
            value[key] = bend_value(value[key], rng, values)
    return value


def in_data(case: Case, rng: random.Random) -> None:
    """A file of rows, or of refusals, by its bytes."""
    name = rng.choice(("forget.jsonl", "retain.jsonl", "refusals.txt"))
    if name == "refusals.txt":
        case.options.update({"--method": "flat", "--refusals": name})
    bend_bytes(case.folder / name, rng)
    case.about = (name,)


def in_rows(case: Case, rng: random.Random) -> None:
    """A file of rows, by the value of a row."""
    name = rng.choice(("forget.jsonl", "retain.jsonl"))
    lines = (case.folder / name).read_text().splitlines()
    number = rng.randrange(len(lines))
    lines[number] = json.dumps(bend_value(json.loads(lines[number]), rng, VALUES))
    (case.folder / name).write_text("\n".join(lines))
    case.about = (f"{name}, line {number + 1}",)


def in_settings(case: Case, rng: random.Random) -> None:
    """The value of an option."""
    method = rng.choice(list(METHODS))
    extra = METHODS[method]
    name = rng.choice((*OPTIONS, *OPTIONAL, *extra, *extra))
    if name in extra:
        case.options["--method"] = method
    case.options[name] = rng.choice(NUMBERS)
    names = {"--lr": "learning_rate"}
    case.about = (name, names.get(name, name[2:].replace("-", "_")), "cannot train the top")
    if name == "--max-length":
        case.about += ("max_length",)


def in_config(case: Case, rng: random.Random) -> None:
    """A file of settings in place of the options, by its bytes or by a value."""
    settings: dict[str, Any] = {
        **{name.removeprefix("--").replace("-", "_"): text for name, text in case.options.items()},
        "method_parameters": {},
        "autocast": False,
        "args": {"max_grad_norm": 1.0, "report_to": ["none"]},
    }
    settings["learning_rate"] = settings.pop("lr")
    path = case.folder / "run.yaml"
    if rng.random() < 0.5:
        path.write_text(json.dumps(bend_value(settings, rng, VALUES)))
    else:
        path.write_text(json.dumps(settings, indent=1))
        bend_bytes(path, rng)
    case.options = {"--config": "run.yaml"}
    case.about = ("run.yaml", "--config", *settings, *OPTIONS, "--model", "--output", "rows to")
    case.about += ("no such file", "could be loaded from")


def in_flags(case: Case, rng: random.Random) -> None:
    """Options that do not go together, and commands that evaluate."""
    flags = ("--chat-template", "--autocast", "--gradient-checkpointing", "--resume", "--no-such")
    case.flags += rng.sample(flags, rng.randint(1, 2))
    if rng.random() < 0.5:
        case.options["--refusals"] = "refusals.txt"
    if rng.random() < 0.3:
        case.options["--method"] = rng.choice(("npo", "flat", "dpo", "unilogit", "undial"))
    case.about = ("chat template", "refusals", "No such option")


def in_evaluation(case: Case, rng: random.Random) -> None:
    """What only `evaluate` takes."""
    case.command = "evaluate"
    data = rng.choice(
        ("a=forget.jsonl", "[/b]=forget.jsonl", "a=retain.jsonl", rng.choice(WRONG_SETS))
    )
    case.options = {"--model": "model", "--data": data}
    name = rng.choice(("--batch-size", "--max-length", "--json", "--dtype"))
    values: tuple[str, ...] = NUMBERS
    if name == "--json":
        values = ("new/folder/x.json", "model", "forget.jsonl/x.json", "n" * 300, "out/x.json")
    case.options[name] = rng.choice(values)
    case.about = (name, name[2:].replace("-", "_"), "--data", "a=", "no such file")


def in_layout(case: Case, rng: random.Random) -> None:
    """Where things lie."""
    option = rng.choice(("--output", "--output", "--model", "--forget", "--retain"))
    places = ("forget.jsonl", "forget.jsonl/x", "model", "nowhere", "", ".", "n" * 300, "loop", "/")
    (case.folder / "loop").symlink_to("loop")
    case.options[option] = rng.choice(places)
    case.about = (option, "output", case.options[option], "no such file", "holds a model")


def in_model_files(case: Case, rng: random.Random) -> None:
    """A file of the model: gone, empty, or other bytes."""
    path = rng.choice(sorted((case.folder / "model").iterdir()))
    match rng.randrange(6):
        case 0:
            path.unlink()
        case 1:
            path.write_bytes(b"")
        case 2:
            path.unlink()
            path.mkdir()
        case _:
            bend_bytes(path, rng)
    case.about = ("model", "tokenizer", "template")


def in_model_values(case: Case, rng: random.Random) -> None:
    """A value of one of the model's JSON files."""
    names = ("config.json", "config.json", "tokenizer_config.json", "generation_config.json")
    path = case.folder / "model" / rng.choice((*names, "tokenizer.json"))
    path.write_text(json.dumps(bend_value(json.loads(path.read_text()), rng, SIZES)))
    case.about = ("model", "tokenizer")
    case.command = rng.choice(("unlearn", "evaluate"))
    if case.command == "evaluate":
        case.options = {"--model": "model", "--data": "a=forget.jsonl"}


def in_template(case: Case, rng: random.Random) -> None:
    """The chat template."""
    path = case.folder / "model" / "chat_template.jinja"
    path.write_text(rng.choice(TEMPLATES))
    if rng.random() < 0.3 and path.stat().st_size:
        bend_bytes(path, rng)
    case.about = ("template", "tokenizer", "max_length")


def in_checkpoint(case: Case, rng: random.Random) -> None:
    """What an unfinished run left."""
    case.options["--output"] = "started"
    case.options["--checkpoint-steps"] = "1"
    case.options["--epochs"] = "3"
    case.flags.append("--resume")
    output = case.folder / "started"
    newest = max((output / "checkpoints").iterdir())
    path = rng.choice([output / "unlearning.json", *sorted(newest.iterdir())])
    if rng.random() < 0.2:
        path.unlink()
    elif path.suffix == ".json" and rng.random() < 0.5:
        path.write_text(json.dumps(bend_value(json.loads(path.read_text()), rng, SIZES)))
    else:
        bend_bytes(path, rng)
    case.about = ("started",)


MUTATIONS: tuple[Callable[[Case, random.Random], None], ...] = (
    *(in_data, in_rows, in_settings, in_config, in_flags, in_evaluation, in_layout),
    *(in_model_files, in_model_values, in_template, in_checkpoint),
)


def make_case(base: Path, folder: Path, number: int) -> Case:
    """A broken copy of a folder of inputs; the same number breaks the same thing.

    Args:
        base: the inputs as they should be.
        folder: of the copy.
        number: of the case; each mutation has its turn.
    """
    shutil.copytree(base, folder)
    options = {
        "--model": "model",
        "--forget": "forget.jsonl",
        "--retain": "retain.jsonl",
        "--output": "out",
        **OPTIONS,
    }
    mutation = MUTATIONS[number % len(MUTATIONS)]
    case = Case(folder, options, broken=mutation.__name__)
    mutation(case, random.Random(number))
    return case
