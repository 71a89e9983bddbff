"""`unilogit unlearn`: its options are the settings of a run (`unlearning.settings`)."""

from __future__ import annotations

from unilogit_kernels.cli.settings_command import takes_settings
from unilogit_kernels.unlearning.settings import Settings


@takes_settings("unlearn")
def unlearn(settings: Settings, resume: bool) -> None:
    """Make a model forget some rows and keep the others.

    The paper's recipe (arXiv 2505.06027) is what runs without further
    options: --method unilogit on the forget rows, which takes neither a
    reference model nor a parameter, beside cross-entropy on as many retain
    rows. What is left to choose:

    unilogit unlearn --model DIR --forget F.jsonl --retain R.jsonl
    --output OUT --lr 1e-5 --epochs 20 --forget-weight 0.03
    --stop-at probability=0.2

    Its ablations are --method unilogit_forward and unilogit_starting_model;
    it is compared with gradient_ascent, npo and undial. All others:
    unilogit methods. The paper's code divides the forget loss by tokens x
    vocabulary, this one by tokens, so its weights do not carry over.
    """
    from unilogit_kernels.cli.training import train

    train(settings, resume)
