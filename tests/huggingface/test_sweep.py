"""No causal LM class of transformers is silently wrong under the fused head."""

import pytest

from tests.huggingface import causal_models
from tests.huggingface.sweep import outcome
from tests.support import ROOT
from tests.support.tiny_models import one_thread

pytestmark = [pytest.mark.prove, pytest.mark.usefixtures(one_thread.__name__)]

NOT_BUILT = {
    "BltForCausalLM": "a vocabulary of hashes of its own",
    "Gemma3nForConditionalGeneration": "a package that is not installed",
    "Gemma4AssistantForCausalLM": "a config whose parts depend on each other",
    "Gemma4UnifiedAssistantForCausalLM": "a config whose parts depend on each other",
    "Gemma4UnifiedForConditionalGeneration": "large parts that its config does not size",
    "ReformerModelWithLMHead": "no backward in eval mode",
}
"""Classes that cannot be built small from their config, or not be run, and why."""


@pytest.mark.parametrize("name", causal_models.names())
def test_is_equal_or_refused(name: str) -> None:
    found = outcome(name)
    if name in NOT_BUILT:
        assert found.kind == "not built", found
    else:
        assert found.kind in ("equal", "refused"), found


def test_the_table_of_the_docs_has_every_class() -> None:
    text = (ROOT / "docs" / "unlearning.md").read_text()
    assert [name for name in causal_models.names() if name not in text] == []
