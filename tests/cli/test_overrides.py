"""Invalid overrides give one line with override and remedy."""

import json
import shutil

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from yaml import YAMLError

from relay_diffusion.cli.errors import caused_by_user, explain
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
        ("logger.wandb.project=a", "logger is not an option without a choice of logger: add logger=NAME, one of csv, "),
        ("relay.stages.relay.sampler.steps=3", "did you mean relay.stages.relay.changes.sampler.steps?"),
        ("steps=3", "steps is not an option; did you mean relay.stages."),
        ("~seedz", "~seedz: seedz is not an option; --help lists the options"),
        ("mode=${nowhere", "mode=${nowhere: "),
        ("relay=quickstrt", "unknown choice relay=quickstrt; did you mean quickstart?"),
        ("trainer=zzz", "unknown choice trainer=zzz; available: default, sampling"),
        ("relay=/no/such/place", "unknown choice relay=/no/such/place; available: cascade, "),
        ("hydra/launcher=nowhere", "unknown choice hydra/launcher=nowhere"),
    ],
)
def test_unreadable_overrides_are_explained(configuration, word, message):
    assert message in explained(configuration, word)


@pytest.mark.parametrize(
    ("stages", "choice", "names"),
    [
        (["base"], "one_stage", ["base"]),
        (["relay"], "two_stages", ["relay"]),
        (["base", "relay"], "two_stages", ["base", "relay"]),
        (["small", "large"], "two_stages", ["base", "relay"]),
        (["a", "b", "c"], "three_stages", ["base", "relay", "third"]),
    ],
)
def test_a_published_relay_is_sampled_by_its_stages(configuration, tmp_path, stages, choice, names):
    folder = tmp_path / "mine"
    folder.mkdir()
    content = {
        "format": 1,
        "stages": {stage: {"path": stage} for stage in stages},
        "consistency": choice == "two_stages",
    }
    (folder / "relay.json").write_text(json.dumps(content))
    paths = " ".join(f"relay.stages.{name}.path={folder / stage}" for name, stage in zip(names, stages, strict=True))
    assert explained(configuration, f"relay={folder}") == (
        f"relay={folder}: is a folder, not a name of conf/relay; write relay={choice} {paths}"
        f"{' relay.consistency=true' if choice == 'two_stages' else ''}"
    )


@pytest.mark.parametrize("content", [None, "{}"])
def test_another_folder_is_an_unknown_choice(configuration, tmp_path, content):
    if content is not None:
        (tmp_path / "relay.json").write_text(content)
    assert explained(configuration, f"relay={tmp_path}").startswith(f"unknown choice relay={tmp_path}; available: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer=chosen"], "did you mean stage.optimizer.weight_decay?"),
        ([], "; a new key is added with +stage.optimizer.weigth_decay=VALUE"),
        (["optimizer=nowhere"], "; a new key is added with +stage.optimizer.weigth_decay=VALUE"),
        (["optimizer=adam,chosen"], "; a new key is added with +stage.optimizer.weigth_decay=VALUE"),
    ],
)
def test_suggestions_follow_the_chosen_groups(tmp_path, words, message):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "optimizer/chosen.yaml").write_text("# @package stage.optimizer\nlr: 1.0\nweight_decay: 0.0\n")
    unknown = "stage.optimizer.weigth_decay=0.1"
    with initialize_config_dir(str(conf), version_base="1.3"), pytest.raises(HydraException) as caught:
        compose("train", overrides=[unknown])
    line = explain(caught.value, conf / "train.yaml", [*words, unknown, "seed=1"])
    assert line.endswith(message)


def test_suggestions_follow_the_chosen_sampler_of_a_stage():
    unknown = "relay.stages.base.sampler.stepz=3"
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(HydraException) as caught:
        compose("sample", overrides=[unknown])
    line = explain(caught.value, CONF / "sample.yaml", ["sampler@relay.stages.base.sampler=multistep", unknown])
    assert line.endswith("; did you mean relay.stages.base.sampler.steps?")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lr: [1\nb: 2\n", "line 2: expected ',' or ']', but got ':'"),
        ("lr: 1\nlr: 2\n", "line 2: found duplicate key lr"),
        ("lr: a: 3\n", "line 1: mapping values are not allowed here"),
    ],
)
def test_invalid_yaml_is_one_line(tmp_path, text, problem):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "optimizer/broken.yaml").write_text(text)
    with initialize_config_dir(str(conf), version_base="1.3"), pytest.raises(YAMLError) as caught:
        compose("train", overrides=["optimizer=broken"])
    assert caused_by_user(caught.value)
    line = explain(caught.value, conf / "train.yaml")
    assert line == f"{conf / 'optimizer/broken.yaml'}, {problem}; correct the YAML"
