"""What must work with other versions of torch and transformers: needs no test runner.

`python -m tests.versions.smoke losses | head | trainer`, each of which includes those before it.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import tempfile
from typing import Any

import torch

LEVELS = ("losses", "head", "trainer")
_EPSILON = torch.finfo(torch.float32).eps


def check_losses() -> None:
    """Every backend that runs here against float64."""
    from unilogit_kernels import available_backends, linear_unilogit_loss, reference, shift_labels

    torch.manual_seed(0)
    hidden = torch.randn(2, 7, 16, requires_grad=True)
    weight = torch.randn(301, 16, requires_grad=True)
    labels = torch.randint(301, (2, 7))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = exact[0] @ exact[1].T
    right = reference.unilogit_loss(logits, shift_labels(labels))
    right.backward()
    for name, reason in available_backends().items():
        if reason is not None:
            print(f"  {name}: {reason}")
            continue
        hidden.grad = weight.grad = None
        loss = linear_unilogit_loss(hidden, weight, labels, shift=True, backend=name)
        loss.backward()
        for ours, theirs in zip((hidden, weight), exact, strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
            assert error < 64 * _EPSILON, (name, error)
        assert abs(loss.item() - right.item()) < 64 * _EPSILON * abs(right.item()), name
        print(f"  {name}: loss and gradients")
    compiled = torch.compile(linear_unilogit_loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(
        compiled(hidden, weight, labels), linear_unilogit_loss(hidden, weight, labels)
    )
    print("  torch.compile, one graph")


def check_head() -> None:
    """Causal LMs of several families: plain, tied, capped and scaled logits."""
    import transformers

    from unilogit_kernels.huggingface import fused_loss, verify_head

    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    configs = {
        "llama": transformers.LlamaConfig(**sizes),
        "llama, tied": transformers.LlamaConfig(**sizes, tie_word_embeddings=True),
        "gemma2": transformers.Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=3.0),
        "cohere": transformers.CohereConfig(**sizes, logit_scale=0.5),
        "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        verify_head(model)
        ids = torch.randint(64, (2, 9))
        ours = fused_loss(model, input_ids=ids, labels=ids, objective="cross_entropy")
        logits = model(input_ids=ids).logits[:, :-1].double()
        theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert abs(ours.item() - theirs.item()) < 64 * _EPSILON * theirs.item(), name
        ours.backward()
        assert all(p.grad is not None for p in model.get_output_embeddings().parameters()), name
        print(f"  {name}: the loss of its own logits, gradients, verify_head")


def check_trainer() -> None:
    """Two steps of unlearning."""
    import transformers

    from unilogit_kernels.unlearning.trainer import UnlearningArguments, UnlearningTrainer

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    rows = [{"input_ids": (ids := torch.randint(1, 64, (8,))), "labels": ids} for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = UnlearningArguments(
            folder, max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True
        )
        trainer = UnlearningTrainer(
            transformers.LlamaForCausalLM(config), arguments, forget=rows, retain=rows, pad_id=0
        )
        trainer.train()
        assert trainer.state.global_step == 2
    print("  UnlearningTrainer: two steps")


CHECKS = {"losses": check_losses, "head": check_head, "trainer": check_trainer}


def main(level: str) -> None:
    found = {}
    for package in ("torch", "transformers", "accelerate", "triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    print(f"Python {platform.python_version()}, {versions}")
    for name in LEVELS[: LEVELS.index(level) + 1]:
        CHECKS[name]()


if __name__ == "__main__":
    main(sys.argv[1])
