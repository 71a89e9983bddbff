"""What a run is asked for: each setting once, with what it is, for Python, files and the shell.

`unilogit unlearn` and `unilogit finetune` have an option for each field, `config` reads the same
names from a YAML file, and `UnlearningArguments` has the fields of two of the classes. torch is not
imported here, so that `--help` need not wait for it; `checks` says what goes together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TASKS = {"unlearn": "unlearning", "finetune": "fine-tuning"}
"""What a run may do, and what that is called while it is done."""

METHOD_OPTIONS: Mapping[str, str] = {
    "alpha": "Parameter of wga, tnpo.",
    "beta": "Parameter of npo, dpo, tnpo...",
    "beta1": "Parameter of satimp.",
    "beta2": "Parameter of satimp.",
    "gamma": "Parameter of undial, self_undial.",
    "delta": "Parameter of simnpo.",
}
"""Parameters of methods with an option of their own; `--method-parameter` takes every one."""


def about(help: str, **more: str) -> dict[str, str]:
    """A field's metadata: its description, where Hugging Face's dataclasses have theirs.

    Args:
        help: what the field is, in a sentence.
        more: of fields of `Settings` alone: `option`, the option's name where it is not the
            field's; `argument`, the argument of `UnlearningArguments` that it becomes; `task`,
            where only one has it.
    """
    return {"help": help, **more}


OF_FINETUNING: Mapping[str, Any] = {
    "task": "finetune",
    "method": "cross_entropy",
    "forget_weight": 1.0,
    "retain_loss": "none",
    "epochs": 5,
}
"""What is another in a run that learns rows and forgets none: nothing stops it but its epochs."""


@dataclass
class HeadSettings:
    """How losses of labels are computed. Each field says in its metadata what it is."""

    z_loss: float = field(
        default=0.0,
        metadata=about(
            "Weight of the squared logsumexp of the logits in the cross-entropy of the rows to "
            "retain, or to learn."
        ),
    )
    logits_dtype: str | None = field(
        default=None,
        metadata=about(
            "What logits are rounded to: float32, bfloat16 or float16. Default: the most that the "
            "device's GEMM can write."
        ),
    )
    skip_below: float = field(
        default=0.0,
        metadata=about("Tokens of a smaller share of the largest slope than this get no gradient."),
    )


@dataclass
class ForgettingSettings:
    """What is forgotten and kept. Each field says in its metadata what it is."""

    method: str = field(
        default="unilogit",
        metadata=about("Loss of the forget rows; `unilogit methods` lists them."),
    )
    method_parameters: dict[str, float] = field(
        default_factory=dict,
        metadata=about("Parameters of the method by name, where they differ from its defaults."),
    )
    forget_weight: float = field(
        default=0.03,
        metadata=about(
            "Factor of the forget loss. Unilogit's slope starts 15 to 25 times as steep as "
            "cross-entropy's where a token is memorised, so 1 is too strong beside a retain weight "
            "of 1."
        ),
    )
    retain_loss: str | None = field(
        default=None,
        metadata=about(
            "Loss of the retain rows: cross_entropy; kl, the divergence KL(starting model || "
            "model), as in KL minimisation and NPO-KL; hidden_states (of rmu); or none, and then "
            "there are no such rows. Default: the method's."
        ),
    )
    retain_weight: float = field(
        default=1.0,
        metadata=about("Factor of the retain rows' loss; where it is dual, the one at the start."),
    )
    retain_per_forget: int = field(default=1, metadata=about("Retain rows for each forget row."))
    dual_step_size: float = field(
        default=0.0,
        metadata=about(
            "Of a retain weight that follows the retain loss, as in PDU: after each update it is "
            "max(0, retain_weight + dual_step_size * (retain loss - target)). 0 leaves it constant."
        ),
    )
    retain_loss_target: float = field(
        default=0.0, metadata=about("Retain loss at which such a weight stays as it is.")
    )
    dual_update: str = field(
        default="step",
        metadata=about(
            "When such a weight is updated: step, by the retain loss of each optimizer step, or "
            "epoch, by the mean over its steps."
        ),
    )
    dual_warmup_epochs: int = field(
        default=0, metadata=about("Epochs before such a weight is updated.")
    )
    stop_at: str | None = field(
        default=None,
        metadata=about(
            "End the run at probability=P, the mean probability of the forget rows' tokens; at "
            "golden=G_EVAL.json, that of a golden model by its results; or at NAME=VALUE, a metric "
            "of the evaluations (--args.eval_strategy). none: after the last epoch. Default of "
            "`unilogit unlearn`: probability=0.2, but of methods that learn."
        ),
    )
    check_steps: int = field(
        default=5,
        metadata=about("Steps between two looks at that at most; near the target there are more."),
    )
    max_retain_loss_rise: float | None = field(
        default=None,
        metadata=about(
            "End the run once the loss of the retain rows' labels, the mean of -log p, has risen "
            "by more than this."
        ),
    )


@dataclass
class Settings(ForgettingSettings, HeadSettings):
    """What a run unlearns from what, or learns, and how.

    Each field says in its metadata what it is; `unilogit unlearn --help` prints it.
    """

    model: str = field(kw_only=True, metadata=about("Directory or Hub id of a causal LM."))
    output: Path = field(
        kw_only=True,
        metadata=about("Directory for the model; checkpoints lie there until the run is done."),
    )
    task: str = field(
        default="unlearn", metadata=about("What is done: unlearn or finetune.", task="")
    )
    forget: Path | None = field(
        default=None,
        metadata=about("File of the rows to forget. Default: the benchmark's.", task="unlearn"),
    )
    retain: Path | None = field(
        default=None,
        metadata=about(
            "File of the rows to keep; none with --retain-loss none. Default: the benchmark's.",
            task="unlearn",
        ),
    )
    data: tuple[Path, ...] = field(
        default=(), metadata=about("A file of rows to learn; may be repeated.", task="finetune")
    )
    benchmark: str | None = field(
        default=None,
        metadata=about(
            "A benchmark whose rows to take, with its split, such as tofu:forget10: tofu, "
            "muse-news, muse-books, rwku or wmdp."
        ),
    )
    data_dir: Path | None = field(
        default=None, metadata=about("Directory that holds the files of the benchmark.")
    )
    with_forget: bool = field(
        default=False,
        metadata=about(
            "Also learn what the benchmark has a model forget: makes the starting model, where the "
            "golden one comes without.",
            task="finetune",
        ),
    )
    refusals: Path | None = field(
        default=None,
        metadata=about(
            "Answers to give instead, one a line, for idk_dpo, dpo and flat; forget rows take "
            "them in turn.",
            task="unlearn",
        ),
    )
    epochs: int = field(
        default=20,
        metadata=about("Passes over the rows to forget, or to learn.", argument="num_train_epochs"),
    )
    learning_rate: float = field(
        default=1e-5,
        metadata=about(
            "Learning rate of AdamW, constant after the warm-up.",
            option="--lr",
            argument="learning_rate",
        ),
    )
    warmup_steps: int = field(
        default=5,
        metadata=about("Steps over which the learning rate rises.", argument="warmup_steps"),
    )
    batch_size: int = field(
        default=8,
        metadata=about(
            "Rows to forget, or to learn, in a batch; retain rows come on top.",
            argument="per_device_train_batch_size",
        ),
    )
    gradient_accumulation: int = field(
        default=1, metadata=about("Batches in a step.", argument="gradient_accumulation_steps")
    )
    label_smoothing: float = field(
        default=0.0,
        metadata=about(
            "Of the cross-entropy of the rows to retain, or to learn, from 0 to 1.",
            argument="label_smoothing_factor",
        ),
    )
    train_layers: int | None = field(
        default=None,
        metadata=about(
            "Train only so many of the top layers; of rmu, from the steered layer down. Default: "
            "all, and 3 of rmu, as in the paper."
        ),
    )
    lora: str | None = field(
        default=None,
        metadata=about(
            "Train a LoRA adapter, such as r=16,alpha=32,targets=all-linear; also dropout=0.05, "
            "rslora, modules_to_save=NAME, and names of targets with + between them."
        ),
    )
    merge: bool = field(
        default=False, metadata=about("Write the whole model, the adapter merged into it.")
    )
    memory_budget_mib: int | None = field(
        default=None,
        metadata=about("MiB that the losses' buffers may take. Default: the device's."),
    )
    max_length: int = field(
        default=512,
        metadata=about("Rows are cut after so many tokens, and texts into blocks of as many."),
    )
    block_stride: int | None = field(
        default=None,
        metadata=about(
            "Tokens from the start of a block of a text to that of the next. Default: all but one "
            "of --max-length."
        ),
    )
    chat_template: bool | None = field(
        default=None,
        metadata=about(
            "Put prompts through the tokenizer's chat template. Default: if it has one."
        ),
    )
    template_arguments: dict[str, Any] = field(
        default_factory=dict,
        metadata=about("An argument of the chat template.", option="--template-arg"),
    )
    dtype: str = field(default="float32", metadata=about("Of the weights: float32 or bfloat16."))
    save_dtype: str | None = field(
        default=None,
        metadata=about(
            "Of the weights that are written: float32 or bfloat16. Default: that of --dtype."
        ),
    )
    autocast: bool = field(
        default=False,
        metadata=about("Compute in bfloat16, whatever the weights are.", argument="bf16"),
    )
    gradient_checkpointing: bool = field(
        default=False, metadata=about("Recompute activations, save memory.")
    )
    report_rows: int = field(
        default=100,
        metadata=about(
            "Rows of each set that are measured before and after. 0: none.", task="unlearn"
        ),
    )
    checkpoint_steps: int = field(
        default=50, metadata=about("Steps between checkpoints.", argument="save_steps")
    )
    seed: int = field(
        default=0, metadata=about("Of the order of the rows, and of dropout.", argument="seed")
    )
    allow_missing_weights: bool = field(
        default=False,
        metadata=about(
            "Take a model whose files lack weights, which are then random, or have others."
        ),
    )
    args: dict[str, Any] = field(
        default_factory=dict,
        metadata=about(
            "Any other argument of transformers.TrainingArguments, by its name, such as "
            "--args.report_to wandb."
        ),
    )

    def recorded(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed, for JSON."""
        return {name: plain(value) for name, value in vars(self).items() if name != "output"}

    @classmethod
    def finetuning(cls, **given: Any) -> Settings:
        """Of a run that learns rows by cross-entropy and forgets none.

        Args:
            given: settings by name; those of forgetting and retaining have no place here.
        """
        return cls(**{**OF_FINETUNING, **given})


def plain(value: Any) -> Any:
    """A setting's value as JSON and YAML have it."""
    if isinstance(value, Path):
        return str(value)
    return [plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def settings_of(task: str) -> Iterator[dataclasses.Field[Any]]:
    """The fields of `Settings` that a command has: of the run, then of what it forgets, and how.

    Args:
        task: a key of `TASKS`.
    """
    forgetting, head = dataclasses.fields(ForgettingSettings), dataclasses.fields(HeadSettings)
    shared = {each.name for each in (*forgetting, *head)}
    by_name = {each.name: each for each in dataclasses.fields(Settings)}
    for name, own in by_name.items():
        if name not in shared and own.metadata.get("task", task) == task:
            yield own
    for part in (forgetting if task == "unlearn" else (), head):
        yield from (by_name[each.name] for each in part)


def option_of(known: dataclasses.Field[Any]) -> str:
    """The option of a setting on the command line."""
    return str(known.metadata.get("option", f"--{known.name.replace('_', '-')}"))


def help_of(name: str) -> str:
    """What a setting is."""
    return str(Settings.__dataclass_fields__[name].metadata["help"])


OWN_ARGUMENTS: Mapping[str, str] = {
    known.metadata["argument"]: known.name
    for known in dataclasses.fields(Settings)
    if "argument" in known.metadata
} | dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), "gradient_checkpointing")
"""Arguments of the Trainer that are settings of their own, with the setting's name."""
