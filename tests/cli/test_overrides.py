"""The words of a command line: flags anywhere, and one clear line for words that Hydra cannot read."""

import shlex

import pytest
from hydra.errors import HydraException

from relay_diffusion.cli.main import explain
from relay_diffusion.cli.overrides import arranged, parse
from relay_diffusion.config import CONF
from relay_diffusion.errors import UserError
from support import run


@pytest.mark.parametrize(
    "words", ["-m a=1 ~b c=2", "a=1 -m ~b c=2", "a=1 ~b --multirun c=2", "a=1 ~b c=2 -m", "a=1 ~b c=2 --multi"]
)
def test_flags_stand_anywhere(words):
    arguments = parse(arranged(words.split()))
    assert arguments.multirun
    assert arguments.overrides == ["a=1", "~b", "c=2"]


def test_flags_keep_their_values():
    arguments = parse(arranged(["a=1", "--cfg", "job", "b=2", "--package=stage"]))
    assert (arguments.cfg, arguments.package, arguments.overrides) == ("job", "stage", ["a=1", "b=2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seeds 3", "--seeds: options are KEY=VALUE, as seeds=3"),
        ("a=1 --seeds 0-7 b=2", "--seeds: options are KEY=VALUE, as seeds=0-7"),
        ("--seeds=3 a=1", "--seeds=3: options are KEY=VALUE, as seeds=3"),
        ("a=1 --seeds", "--seeds: options are KEY=VALUE, as seeds=VALUE"),
        ("--cfg nothing", "--cfg/-c: invalid choice: 'nothing'"),
    ],
)
def test_unknown_flags_are_named(words, message):
    with pytest.raises(UserError) as caught:
        parse(arranged(words.split()))
    assert message in str(caught.value)


def explained(configuration, word):
    with pytest.raises(HydraException) as caught:
        configuration("sample", word)
    line = explain(caught.value, CONF / "sample.yaml")
    assert "\n" not in line
    return line


@pytest.mark.parametrize("value", ["Häuser & Gärten", "it's", "a b=c.zip", "a=c.zip", "a (1).zip", "a,it's"])
def test_a_value_that_needs_quotes_is_shown_with_them(configuration, value):
    line = explained(configuration, f"class={value}")
    assert line.startswith(f"class={value} cannot be read: ")
    assert "needs quotes inside" in line
    (typed,) = shlex.split(line[line.index('"') :])
    assert configuration("sample", typed)["class"] == value


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seeds=[1", "seeds=[1 cannot be read: brackets must close"),
        ("class=[a & b,c]", "need quotes, as \"['a & b',c]\""),
        ("seeds", "seeds: options are KEY=VALUE, as seeds=0-7"),
        ("a b=3", "a b=3: options are KEY=VALUE"),
        ("seeds=0,1", "seeds=0,1: a list is seeds=[0,1], a text \"seeds='0,1'\" (commas without brackets are for"),
    ],
)
def test_words_that_cannot_be_read_are_explained(configuration, word, message):
    assert message in explained(configuration, word)


def test_the_version_is_that_of_this_package():
    result = run("train.py", "--version")
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert line.startswith("relay-diffusion 0.")
    for name in ("hydra 1.", "torch 2.", "lightning 2."):
        assert name in line
