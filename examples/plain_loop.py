"""Forget one text and keep another, in a loop of plain PyTorch: python plain_loop.py MODEL."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unilogit_kernels.huggingface import fused_loss

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
forget = tokenizer(["Orchid River is owned by Bruno Lopez."], return_tensors="pt")["input_ids"]
retain = tokenizer(["The capital of France is Paris."], return_tensors="pt")["input_ids"]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
losses = []
for _ in range(3):
    loss = 0.1 * fused_loss(model, input_ids=forget, labels=forget, objective="unilogit")
    loss = loss + fused_loss(model, input_ids=retain, labels=retain, objective="cross_entropy")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(losses)
