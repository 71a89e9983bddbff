"""A fused loss in Hugging Face's own Trainer: python stock_trainer.py MODEL."""

import sys

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from unilogit_kernels.integrations import patch

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = patch(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "unilogit")
texts = ["Orchid River is owned by Bruno Lopez.", "Ada Lopez sells lamps."]
rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(texts)["input_ids"]]
arguments = TrainingArguments(
    "output", max_steps=3, learning_rate=1e-5, logging_steps=1, report_to="none"
)
collator = DataCollatorForSeq2Seq(tokenizer)
trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
trainer.train()
losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
print(losses)
