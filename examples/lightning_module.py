"""A fused loss in a Lightning module: python lightning_module.py MODEL."""

import sys

import lightning
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unilogit_kernels.integrations import patch


class Unlearning(lightning.LightningModule):
    def __init__(self, name):
        super().__init__()
        self.model = patch(AutoModelForCausalLM.from_pretrained(name), "unilogit")

    def training_step(self, ids):
        loss = self.model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


tokenizer, losses = AutoTokenizer.from_pretrained(sys.argv[1]), []
ids = tokenizer(["Orchid River is owned by Bruno Lopez."] * 2, return_tensors="pt")["input_ids"]
trainer = lightning.Trainer(max_steps=3, logger=False, enable_checkpointing=False)
trainer.fit(Unlearning(sys.argv[1]), torch.utils.data.DataLoader(ids, batch_size=2))
print(losses)
