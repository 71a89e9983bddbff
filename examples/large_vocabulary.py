"""Forget some rows of made-up data, whatever the vocabulary: python large_vocabulary.py MODEL.

`python -m benchmarks.large_vocabulary` leaves a MODEL that knows them in
runs/large-vocabulary/memorised: 131,072 tokens, of which a batch would have 0.5 GiB of logits.
"""

import resource
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from unilogit_kernels.unlearning.data import Encoding, padding_id, read_rows
from unilogit_kernels.unlearning.demo.tofu_shape import make_tofu_shaped, write_tofu_shaped
from unilogit_kernels.unlearning.trainer import UnlearningArguments, UnlearningTrainer

tables = make_tofu_shaped(sellers=40, forget_sellers=8, holdout_sellers=8)
files = write_tofu_shaped(tables, Path("data"))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
forget, retain = (
    [example.features() for example in Encoding(tokenizer).encode(read_rows(files[name]))]
    for name in ("forget20", "retain80")
)
arguments = UnlearningArguments(
    "output", per_device_train_batch_size=16, learning_rate=2e-4, max_steps=3, logging_steps=1
)
model, pad_id = AutoModelForCausalLM.from_pretrained(sys.argv[1]), padding_id(tokenizer)
trainer = UnlearningTrainer(model, arguments, forget=forget, retain=retain, pad_id=pad_id)
trainer.train()
losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
print(losses, f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB at most")
