"""load_relay and the exports of the package root."""

import functools
import inspect
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image

import relay_diffusion as rd
from relay_diffusion.diffusion.corruption import block_mean
from relay_diffusion.diffusion.pixels import to_float
from relay_diffusion.errors import UserError
from relay_diffusion.models.sample_arguments import label_tensor
from support import PROJECT


@pytest.mark.slow
def test_the_example_of_the_package_runs(monkeypatch, tmp_path):
    example = textwrap.dedent(rd.__doc__.split("\n\n", 1)[1])
    example = example.replace('"demo/emoji"', repr(str(PROJECT / "demo/emoji"))).replace("range(4)", "range(1)")
    few_steps = {name: {"sampler": {"steps": 2}} for name in ("base", "relay")}
    monkeypatch.setattr(rd, "load_relay", functools.partial(rd.load_relay, changes=few_steps))
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
        "print([m for m in ('torch', 'lightning', 'hydra', 'huggingface_hub') if m in sys.modules])"
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
def folder(relay_folder, tmp_path):
    """Create the folder of a relay with one small stage."""
    shutil.copytree(relay_folder / "base", tmp_path / "relay/base")
    write(tmp_path / "relay", {"format": 1, "stages": {"base": {"path": "base"}}})
    return tmp_path / "relay"


def write(folder, content):
    (folder / "relay.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_paths_are_relative_to_the_file(folder):
    for source in (folder, str(folder), folder / "relay.json", {"base": folder / "base"}):
        relay = rd.load_relay(source, changes={"base": {"sampler": {"steps": 2}}})
        assert relay.samplers["base"].evaluations == 3
        assert list(relay.chain()) == ["base"]
    images = relay.sample(seeds=range(2), labels=["light", "dark"])
    assert torch.equal(images, relay.sample(seeds=range(2), labels=[1, 0]))
    stage = relay.chain()["base"]
    assert torch.equal(images, stage.sample(images.shape, range(2), ["light", "dark"]))
    assert rd.load_relay(folder, resolution=[16, 24]).sample(5).shape == (1, 3, 16, 24)


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
        {"format": 1, "stages": {"base": {"path": "base"}}, "consistency": 1},
    ],
)
def test_a_malformed_file_is_refused(folder, content):
    write(folder, content)
    with pytest.raises(UserError, match=r'relay\.json cannot be read: must be \{"format": 1') as caught:
        rd.load_relay(folder)
    assert str(caught.value).startswith(str(folder))


def test_errors_name_the_stage_that_cannot_be_loaded(folder, tmp_path):
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


EDM = "relay_diffusion.samplers.EDMSampler"


def examples(function, folder):
    """Evaluate the indented calls of a docstring."""
    lines = [
        line.strip() for line in inspect.getdoc(function).splitlines() if line.startswith(f"    {function.__name__}(")
    ]
    lines = [line.replace('"demo/emoji"', repr(str(folder))) for line in lines]
    return [eval(line, {function.__name__: function, "path": folder / "base"}) for line in lines]


def test_the_examples_of_replaced_samplers_run(folder):
    (stage,) = examples(rd.load_stage, folder)
    assert stage.sampler.evaluations == 23
    assert [relay.samplers["base"].evaluations for relay in examples(rd.load_relay, folder)] == [3, 3]


def test_another_sampler_replaces_the_stored_one_which_changes_then_cannot_change(folder):
    other, changes = {"_target_": EDM, "steps": 5, "sigma_min": 0.1}, {"sampler": {"steps": 30, "churn": None}}
    with pytest.raises(UserError, match=r"^changes\.sampler={'steps': 30}: .* which sampler replaces; set these"):
        rd.load_stage(folder / "base", changes=changes, sampler=other)
    stage = rd.load_stage(folder / "base", changes={"sampler": {"steps": None}}, sampler=other)
    assert stage.info.config["sampler"] == {"_target_": EDM, "steps": 5, "sigma_min": 0.1}
    assert (stage.sampler.churn, stage.sampler.evaluations) == (0, 9)


def test_another_sampler_gets_the_corruption_of_its_stage(relay_folder):
    blurring = "relay_diffusion.samplers.BlurringSampler"
    for given, strength in ((None, 0.15), ({"block_strength": 0.3}, 0.3)):
        stage = rd.load_stage(relay_folder / "relay", sampler={"_target_": blurring, "steps": 9, "corruption": given})
        assert stage.sampler.corruption.block_strength == strength
        assert stage.corruption.block_strength == 0.15
    with pytest.raises(UserError, match=r"^sampler\.corruption\.block_strengt: unknown key; .* block_strength\?"):
        rd.load_stage(relay_folder / "relay", sampler={"_target_": blurring, "corruption": {"block_strengt": 0.3}})


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"_target_": EDM, "step": 5}, r"sampler\.step: unknown key; did you mean steps\?"),
        ({"steps": 5}, r"must name its class as _target_; changes\.sampler changes values"),
        ("edm", "sampler=edm: must name its class"),
        ({"_target_": "os.system"}, r"sampler names 'os\.system', which is not a class of relay_diffusion: refused"),
        ({"_target_": f"{EDM}s"}, "sampler names .*EDMSamplers, which is not a class that can be imported"),
        ({"_target_": EDM, "steps": 0}, "cannot be built: steps=0"),
    ],
)
def test_samplers_that_cannot_be_used(folder, sampler, message):
    with pytest.raises(UserError, match=message):
        rd.load_relay(folder, samplers={"base": sampler})
    with pytest.raises(UserError, match=r"samplers\.bsae: .*its stages are base"):
        rd.load_relay(folder, samplers={"bsae": sampler})


def test_changes_keep_the_class(folder):
    changes = {"base": {"sampler": {"_target_": "relay_diffusion.samplers.BlurringSampler"}}}
    with pytest.raises(UserError, match=r"sampler\._target_=.*: changes keep the class; give another sampler"):
        rd.load_relay(folder, changes=changes)


def test_a_choice_of_conf_relay(monkeypatch, tmp_path):
    monkeypatch.chdir(PROJECT)
    relay = rd.load_relay(
        "emoji", changes={"relay": {"sampler": {"steps": 4}}}, samplers={"base": {"_target_": EDM, "steps": 3}}
    )
    assert [relay.samplers[name].evaluations for name in ("base", "relay")] == [5, 4]
    assert relay.chain()["relay"].info.origin["file"] == str(Path("demo/emoji_text_256/stage.json"))
    with pytest.raises(UserError, match=r"no relay at emoj: .*a choice of conf/relay \(cascade, .*emoji, "):
        rd.load_relay("emoj")
    with pytest.raises(UserError, match=r"relay=two_stages: relay\.stages\.base\.path has no value"):
        rd.load_relay("two_stages")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"relay=quickstart: stages\.base: no checkpoint at outputs/quickstart/base"):
        rd.load_relay("quickstart")


@pytest.mark.slow
def test_photographs_are_enlarged_with_their_block_means(monkeypatch):
    """The bundled file says so, as relay=photos does."""
    image = torch.randint(112, 144, (1, 3, 8, 8), dtype=torch.uint8)
    relay = rd.load_relay(PROJECT / "demo/photos", changes={"relay": {"sampler": {"steps": 3}}})
    assert relay.consistency
    large = relay.sample([0], start=image)
    assert large.shape == (1, 3, 32, 32)
    assert (block_mean(large.double(), 4) - to_float(image).double()).abs().max() < 1e-5
    monkeypatch.chdir(PROJECT)
    assert rd.load_relay("photos").consistency


def test_a_choice_keeps_its_options(monkeypatch, folder, tmp_path):
    """The relay has the rounding and postprocessing of the yaml."""
    monkeypatch.setattr("relay_diffusion.checkpoints.loading.CONF", tmp_path / "conf")
    (tmp_path / "conf/relay").mkdir(parents=True)
    (tmp_path / "conf/sample.yaml").write_text("defaults: [_self_, relay: mine]\ntrusted: []\n")
    stage = f"{{_target_: relay_diffusion.checkpoints.load_stage, path: {folder}/base, weights: raw}}"
    postprocess = "{_target_: relay_diffusion.sampling.postprocess.Enhance, brightness: 1.5}"
    (tmp_path / "conf/relay/mine.yaml").write_text(
        f"stages: {{base: {stage}}}\nhand_over_sigma: null\nrounding: floor\npostprocess: {postprocess}\n"
    )
    relay = rd.load_relay("mine", weights="ema")
    assert (relay.rounding, relay.postprocess.brightness) == ("floor", 1.5)
    assert not relay.consistency  # an option that the yaml leaves out
    assert relay.chain()["base"].info.origin["weights"] == "ema"
    with pytest.raises(UserError, match="holds no raw weights"):  # those of the yaml
        rd.load_relay("mine")
