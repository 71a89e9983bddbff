"""Options of other commands that are settings of a run, too: named and described as there."""

from __future__ import annotations

from typing import Annotated

import typer

from unilogit_kernels.unlearning.settings import help_of

MaxLength = Annotated[int, typer.Option(help=help_of("max_length"))]
ChatTemplate = Annotated[
    bool | None,
    typer.Option("--chat-template/--no-chat-template", help=help_of("chat_template")),
]
TemplateArg = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help=help_of("template_arguments")),
]
Dtype = Annotated[str, typer.Option(help=help_of("dtype"))]
AllowMissing = Annotated[
    bool, typer.Option("--allow-missing-weights", help=help_of("allow_missing_weights"))
]
