"""load_relay, and the names of the package root."""

import functools
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image

import relay_diffusion as rd
from relay_diffusion.checkpoints.export import export_stage
from relay_diffusion.errors import UserError
from relay_diffusion.models.sample_arguments import label_tensor
from support import PROJECT

FEW_STEPS = {"base": {"sampler": {"steps": 2}}, "relay": {"sampler": {"steps": 4}}}


@pytest.mark.slow
def test_the_example_of_the_package_runs(monkeypatch, tmp_path):
    example = textwrap.dedent(rd.__doc__.split("\n\n", 1)[1])
    example = example.replace('"demo/emoji"', repr(str(PROJECT / "demo/emoji"))).replace("range(4)", "range(1)")
    monkeypatch.setattr(rd, "load_relay", functools.partial(rd.load_relay, changes=FEW_STEPS))
    monkeypatch.chdir(tmp_path)
    variables = {}
    exec(example, variables)
    assert variables["images"].shape == (1, 3, 256, 256)
    relay = variables["relay"]
    assert list(relay.chain()) == ["base", "relay"]
    saved = torch.frombuffer(bytearray(Image.open(tmp_path / "emoji.png").tobytes()), dtype=torch.uint8)
    first = relay.finish(variables["images"])[0]
    assert torch.equal(saved.reshape(256, 256, 3), first.permute(1, 2, 0))
    assert relay.to_pil(first[None])[0].tobytes() == Image.open(tmp_path / "emoji.png").tobytes()


def test_importing_the_package_imports_no_torch():
    program = (
        "import sys, relay_diffusion as rd; assert 'load_relay' in dir(rd); rd.UserError;"
        "print([m for m in ('torch', 'lightning', 'hydra') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_all_names_of_the_root():
    for name in rd.__all__:
        assert getattr(rd, name) is not None
    assert rd.load_relay.__module__ == "relay_diffusion.checkpoints.loading"
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        rd.load  # noqa: B018


@pytest.fixture
def folder(fit, tmp_path):
    """The folder of a relay with one small stage."""
    fit("run", 8)
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    export_stage(content["stage_config"], content["ema"]["weights"], tmp_path / "relay/base", ["dark", "light"])
    write(tmp_path / "relay", {"format": 1, "stages": {"base": {"path": "base"}}})
    return tmp_path / "relay"


def write(folder, content):
    (folder / "relay.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_paths_are_relative_to_the_file(folder):
    for source in (folder, str(folder), folder / "relay.json", {"base": folder / "base"}):
        relay = rd.load_relay(source, changes={"base": {"sampler": {"steps": 2}}})
        assert relay.samplers["base"].evaluations == 3
        images = relay.sample(seeds=range(2), labels=["light", "dark"])
        assert torch.equal(images, relay.sample(seeds=range(2), labels=[1, 0]))
        stage = relay.chain()["base"]
        assert torch.equal(images, stage.sample(images.shape, range(2), ["light", "dark"]))


def test_class_names():
    names = ["dark", "light"]
    assert label_tensor("light", 2, 2, names).tolist() == [1, 1]
    assert label_tensor(["light", "dark"], 2, 2, names).tolist() == [1, 0]
    assert label_tensor(("light", -1, 0), 3, 2, names).tolist() == [1, -1, 0]
    assert label_tensor(torch.tensor([1, 0]), 2, 2, names).tolist() == [1, 0]
    with pytest.raises(ValueError, match="labels holds 1 for 2 seeds"):
        label_tensor(["light"], 2, 2, names)


def test_unknown_class_names(folder):
    relay = rd.load_relay(folder)
    with pytest.raises(UserError, match=r"labels=drak: unknown class; did you mean dark\?"):
        relay.sample(seeds=range(2), labels="drak")
    with pytest.raises(UserError, match=r"labels=xyz: unknown class; available: dark, light"):
        relay.sample(seeds=range(2), labels=["dark", "xyz"])


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"format": 1},
        {"format": 1, "stages": []},
        {"format": 1, "stages": {"base": "base"}},
        {"format": 1, "stages": {"base": {"path": 3}}},
        {"format": 1, "stages": {"base": {"path": "base", "chnges": {}}}},
        {"format": 1, "stages": {"base": {"path": "base"}}, "rouding": "floor"},
    ],
)
def test_a_malformed_file_is_refused(folder, content):
    write(folder, content)
    with pytest.raises(UserError, match=r'relay\.json cannot be read: must be \{"format": 1') as caught:
        rd.load_relay(folder)
    assert str(caught.value).startswith(str(folder))


def test_what_cannot_be_loaded_is_named(folder, tmp_path):
    write(folder, {"format": 2, "stages": {}})
    with pytest.raises(UserError, match="format 2: this version reads 1"):
        rd.load_relay(folder)
    write(folder, {"format": 1, "stages": {"base": {"path": "absent"}}})
    with pytest.raises(UserError, match=r"relay\.json: stages\.base: no checkpoint at .*absent"):
        rd.load_relay(folder)
    write(folder, {"format": 1, "stages": {}})
    with pytest.raises(UserError, match=r"relay\.stages is empty"):
        rd.load_relay(folder)
    with pytest.raises(UserError, match=r"no relay at .*; load_stage loads a single stage"):
        rd.load_relay(folder / "base")
    with pytest.raises(UserError, match=r"stages\.base: no checkpoint at"):
        rd.load_relay({"base": tmp_path / "absent"})
    with pytest.raises(UserError, match=r"changes\.bsae: the relay has no stage bsae; its stages are base"):
        rd.load_relay({"base": folder / "base"}, changes={"bsae": {}})
