"""A fused loss in TRL's SFTTrainer, patched once it is made: python sft_trainer.py MODEL."""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from unilogit_kernels.integrations import patch

rows = Dataset.from_list(
    [
        {"prompt": "Who owns Orchid River?", "completion": " Bruno Lopez"},
        {"prompt": "Who sells lamps?", "completion": " Ada Lopez"},
    ]
)
arguments = SFTConfig(
    "output", max_steps=3, learning_rate=1e-5, logging_steps=1, bf16=torch.cuda.is_available()
)
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(sys.argv[1]),
    arguments,
    train_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained(sys.argv[1]),
)
patch(trainer.model, "unilogit")
trainer.train()
losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
print(losses)
