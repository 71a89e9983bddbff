"""Options that several commands have, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Directory or Hub id of a causal LM.")]
Output = Annotated[Path, typer.Option(help="Directory for the model.")]
Benchmark = Annotated[
    str | None,
    typer.Option(
        help="A benchmark whose rows to take, with its split, such as tofu:forget10: tofu, "
        "muse-news, muse-books, rwku or wmdp."
    ),
]
DataDir = Annotated[
    Path | None, typer.Option(help="Directory that holds the files of the benchmark.")
]
Epochs = Annotated[int, typer.Option(help="Passes over the rows.")]
LearningRate = Annotated[float, typer.Option(help="Learning rate, constant after the warm-up.")]
WarmupSteps = Annotated[int, typer.Option(help="Steps over which the learning rate rises.")]
GradientAccumulation = Annotated[int, typer.Option(help="Batches in a step.")]
TrainLayers = Annotated[int | None, typer.Option(help="Train only so many of the top layers.")]
Lora = Annotated[
    str | None,
    typer.Option(
        help="Train a LoRA adapter, such as r=16,alpha=32,targets=all-linear; also dropout=0.05, "
        "rslora, modules_to_save=NAME, and names of targets with + between them."
    ),
]
Merge = Annotated[
    bool, typer.Option("--merge", help="Write the whole model, the adapter merged into it.")
]
MemoryBudget = Annotated[int | None, typer.Option(help="MiB that the losses' buffers may take.")]
LogitsDtype = Annotated[
    str | None, typer.Option(help="What logits are rounded to: float32, bfloat16 or float16.")
]
SkipBelow = Annotated[
    float, typer.Option(help="Tokens of a smaller share of the largest slope get no gradient.")
]
MaxLength = Annotated[
    int, typer.Option(help="Rows are cut after so many tokens, and texts into blocks of as many.")
]
BlockStride = Annotated[
    int | None,
    typer.Option(
        help="Tokens from the start of a block of a text to that of the next. Default: all but "
        "one of --max-length."
    ),
]
ChatTemplate = Annotated[
    bool | None,
    typer.Option(
        "--chat-template/--no-chat-template",
        help="Put prompts through the tokenizer's chat template. Default: if it has one.",
    ),
]
TemplateArg = Annotated[
    list[str] | None,
    typer.Option(help="An argument of the chat template, as NAME=VALUE; may be repeated."),
]
Dtype = Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")]
Autocast = Annotated[
    bool, typer.Option("--autocast", help="Compute in bfloat16, whatever the weights are.")
]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Recompute activations, save memory.")
]
CheckpointSteps = Annotated[int, typer.Option(help="Steps between checkpoints.")]
Seed = Annotated[int, typer.Option(help="Of the order of the rows.")]
AllowMissing = Annotated[
    bool,
    typer.Option(
        "--allow-missing-weights",
        help="Take a model whose files lack weights, which are then random, or have others.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output.")
]
