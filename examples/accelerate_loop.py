"""The plain loop on any number of devices: accelerate launch accelerate_loop.py MODEL."""

import sys

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from unilogit_kernels.integrations import patch

accelerator = Accelerator()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = patch(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "unilogit")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
ids = tokenizer(["Orchid River is owned by Bruno Lopez."] * 2, return_tensors="pt")["input_ids"]
loader = torch.utils.data.DataLoader(ids, batch_size=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
losses = []
for _ in range(3):
    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
accelerator.print(losses)
