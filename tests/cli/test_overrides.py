"""Invalid overrides give one line with override and remedy."""

import pytest
from hydra.errors import HydraException

from relay_diffusion.cli.errors import explain
from relay_diffusion.config import CONF


def explained(configuration, word):
    with pytest.raises(HydraException) as caught:
        configuration("sample", word)
    line = explain(caught.value, CONF / "sample.yaml")
    assert "\n" not in line
    return line


@pytest.mark.parametrize("value", ["Häuser & Gärten", "it's", "a b=c.zip", "a=c.zip", "a (1).zip", "a,it's"])
def test_a_value_that_needs_quotes_is_named(configuration, value):
    line = explained(configuration, f"class={value}")
    assert line.startswith(f"class={value}: ")
    assert "needs quotes inside" in line


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seeds=[1", "seeds=[1: options are KEY=VALUE, as seeds=0-7; brackets must close"),
        ("class=[a & b,c]", "needs quotes inside"),
        ("seeds", "seeds: options are KEY=VALUE, as seeds=0-7"),
        ("a b=3", "a b=3: options are KEY=VALUE"),
        ("seedz=3", "seedz is not an option; did you mean seeds?"),
        ("relay.stages.relay.sampler.steps=3", "did you mean relay.stages.relay.changes.sampler.steps?"),
        ("steps=3", "steps is not an option; did you mean relay.stages."),
        ("~seedz", "'seedz' does not exist"),
        ("mode=${nowhere", "mode=${nowhere: "),
        ("relay=quickstrt", "unknown choice relay=quickstrt; did you mean quickstart?"),
        ("trainer=zzz", "unknown choice trainer=zzz; available: default, sampling"),
    ],
)
def test_unreadable_overrides_are_explained(configuration, word, message):
    assert message in explained(configuration, word)
