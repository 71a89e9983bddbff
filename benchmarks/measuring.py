"""Every metric of three models on made-up data, and how long it takes: `unilogit evaluate`.

A Llama of 3 million parameters learns the data of `unilogit dataset` from nothing, with a tokenizer
trained on its text; twice, with and without the rows to forget. The first is then unlearned, and
`unilogit evaluate` measures all three. What is there already is not made again.

    python -m benchmarks.measuring --folder runs/measuring --json benchmarks/results/measuring.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from benchmarks.figures import command_of, write
from unilogit_kernels.bench.devices import find_device

VOCAB_SIZE = 2048
BENCHMARK = "tofu:forget25"
METRICS = (
    "forget_Q_A_Prob",
    "forget_Q_A_ROUGE",
    "forget_truth_ratio",
    "forget_quality",
    "model_utility",
    "exact_memorization",
    "extraction_strength",
    "mia_loss",
    "mia_min_k",
    "mia_min_k_plus_plus",
    "privleak",
)


def save_llama(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, intermediate_size: int, max_length: int
) -> None:
    """A small Llama that knows nothing, for a tokenizer; always the same weights."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def texts(data: Path) -> Iterator[str]:
    """All questions and answers of a folder."""
    for path in sorted({*data.glob("*.jsonl")} - {data / "idk.jsonl"}):  # which is plain text
        for line in path.read_text(encoding="utf-8").splitlines():
            for value in json.loads(line).values():
                yield from value if isinstance(value, list) else [str(value)]


def make_model(folder: Path, data: Path) -> None:
    """A model that knows nothing, and its tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(data), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=256
    )
    save_llama(folder, fast, intermediate_size=512, max_length=256)
    fast.save_pretrained(folder)


def run(*arguments: str | Path) -> float:
    """A command of the package; returns its seconds."""
    command = [sys.executable, "-m", "unilogit_kernels.cli", *map(str, arguments)]
    print("unilogit", *arguments, flush=True)
    started = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "COLUMNS": "110"})
    return time.perf_counter() - started


def prepare(folder: Path) -> None:
    """Data and the three models."""
    data, new = folder / "data", folder / "new"
    if not data.exists():
        run("dataset", "--output", data)
    if not new.exists():
        make_model(new, data)
    learn: list[str | Path] = ["finetune", "--model", new, "--benchmark", BENCHMARK]
    learn += ["--data-dir", data, "--epochs", "40", "--lr", "1e-3", "--batch-size", "16"]
    if not (folder / "starting" / "config.json").exists():
        run(*learn, "--with-forget", "--output", folder / "starting")
    if not (folder / "golden" / "config.json").exists():
        run(*learn, "--output", folder / "golden")
    if not (folder / "unlearned" / "config.json").exists():
        forget: list[str | Path] = ["unlearn", "--model", folder / "starting"]
        forget += ["--benchmark", BENCHMARK, "--data-dir", data, "--output", folder / "unlearned"]
        run(*forget, "--lr", "2e-4", "--batch-size", "16", "--epochs", "3")  # half-way


def cell(found: dict[str, Any] | None) -> str:
    """A metric with its interval."""
    if found is None or found["value"] is None:
        return "not computed"
    if found["low"] is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} ({found['low']:.3f} - {found['high']:.3f})"


def table(columns: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown: a row for each metric, a column for each model."""
    return [
        f"| metric | {' | '.join(columns)} |",
        "|---|---:|---:|---:|",
        *(
            f"| `{name}` | "
            + " | ".join(cell(found.get(name)) for found in columns.values())
            + " |"
            for name in METRICS
        ),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Make what is missing, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/measuring"))
    parser.add_argument("--json", type=Path, default=Path("runs/measuring.json"))
    given = parser.parse_args(arguments)
    folder = given.folder
    prepare(folder)
    facts = find_device("cpu").facts()
    results = folder / "results"
    shutil.rmtree(results, ignore_errors=True)  # so that nothing is gone on with
    measure: list[str | Path] = ["evaluate", "--model", folder / "unlearned"]
    measure += ["--golden", folder / "golden", "--starting", folder / "starting"]
    measure += ["--benchmark", BENCHMARK, "--data-dir", folder / "data", "--output", results]
    seconds = run(*measure)
    columns = {
        name: json.loads((where / "results.json").read_text(encoding="utf-8"))["metrics"]
        for name, where in (
            ("starting", results / "starting"),
            ("unlearned", results),
            ("golden", results / "golden"),
        )
    }
    lines = [
        f"`unilogit evaluate` on the three models took {seconds:.0f} s, its start included.",
        "Aggregates with 95 % intervals over rows.",
        "",
        *table(columns),
    ]
    figures = [{"seconds": seconds, **columns}]
    title = "Measuring three models on made-up data"
    write(given.json, facts, command_of("measuring", arguments), title, lines, figures)


if __name__ == "__main__":
    main()
