"""`unilogit finetune`: teach a model rows, such as those that a golden model is to know."""

from __future__ import annotations

from unilogit_kernels.cli.settings_command import takes_settings
from unilogit_kernels.unlearning.settings import Settings


@takes_settings("finetune")
def finetune(settings: Settings, resume: bool) -> None:
    """Teach a model rows by cross-entropy, as for a model that never saw those to forget."""
    from unilogit_kernels.cli.training import train

    train(settings, resume)
