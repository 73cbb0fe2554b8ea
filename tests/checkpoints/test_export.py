"""Export stages, load them, and reject incomplete exports."""

import dataclasses
import json
import shutil

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from forged_checkpoints import EDM, TRAINING_STATE, rewritten
from relay_diffusion import __version__
from relay_diffusion.checkpoints import export
from relay_diffusion.checkpoints.export import export_stage
from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.checkpoints.published import convert
from relay_diffusion.cli import convert_checkpoint
from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.cli.convert_checkpoint import USAGE, ConvertOptions
from relay_diffusion.errors import UserError
from relay_diffusion.models import StageInfo
from relay_diffusion.utils.files import file_sha256
from support import PROJECT, TINY, class_indices, run


@pytest.fixture
def stage(configuration):
    """Build a tiny stage with random weights."""
    cfg = configuration("train", *TINY, "resolution=16", "data.dataset.path=unused.zip")
    info = StageInfo(OmegaConf.to_container(cfg.stage, resolve=True))
    stage = instantiate(cfg.stage, _convert_="all", _partial_=True)(info=info)
    for parameter in stage.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return stage


@pytest.fixture
def exported(stage, tmp_path):
    weights = stage.denoiser.state_dict()
    return export_stage(stage.info.config, weights, tmp_path / "shared", ["dark", "light"], 640, {"file": "run"})


def tool(*arguments):
    return run_tool(arguments, USAGE, ConvertOptions, convert_checkpoint._convert_and_report)


def refused(path, *words, **options):
    with pytest.raises(UserError) as caught:
        load_stage(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message.replace(str(path), "")  # which names the test


def test_round_trip_is_exact(stage, exported):
    for path in (exported, str(exported), exported / "stage.json"):
        loaded = load_stage(path)
        assert not loaded.training
        assert loaded.state_dict().keys() == stage.state_dict().keys()
        for name, value in stage.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
    assert (loaded.info.class_names, loaded.info.images_seen) == (["dark", "light"], 640)
    assert loaded.info.config == {key: value for key, value in stage.info.config.items() if key != "optimizer"}
    assert loaded.sampler.churn_max == float("inf")
    assert loaded.info.origin["file"] == str(exported / "stage.json")
    assert loaded.info.origin["sha256"] == file_sha256(exported / "stage.json")
    images = [s.sample((2, 3, 16, 16), [3, 4], torch.tensor([0, 1])) for s in (stage, loaded)]
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)


def test_files_of_an_export(exported):
    assert sorted(path.name for path in exported.iterdir()) == ["stage.json", "weights.safetensors"]
    text = (exported / "stage.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["version"] == __version__
    assert content["origin"] == {"file": "run"}
    sha256 = file_sha256(exported / "weights.safetensors")
    assert content["weights"] == {"kind": "ema", "dtype": "float32", "sha256": sha256}


def test_changes_and_trust_hold_for_exports(exported):
    assert load_stage(exported, changes={"sampler": {"steps": 7}}).sampler.evaluations == 13
    refused(exported, "stepz", changes={"sampler": {"stepz": 7}})
    refused(exported, "holds no raw weights: use weights=ema", weights="raw")
    file = exported / "stage.json"
    content = json.loads(file.read_text())
    content["stage_config"]["loss"]["_target_"] = "os.system"
    file.write_text(json.dumps(content))
    refused(exported, "names 'os.system'")


def test_raw_weights_are_raw_weights(stage, tmp_path):
    export_stage(stage.info.config, stage.denoiser.state_dict(), tmp_path / "raw", kind="raw")
    loaded = load_stage(tmp_path / "raw", weights="raw").denoiser.state_dict()
    for name, value in stage.denoiser.state_dict().items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0, msg=name)
    refused(tmp_path / "raw", "holds no ema weights: use weights=raw")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_halves_the_file(stage, exported, tmp_path, dtype):
    half = export_stage(stage.info.config, stage.denoiser.state_dict(), tmp_path / "half", dtype=dtype)
    sizes = [(folder / "weights.safetensors").stat().st_size for folder in (half, exported)]
    assert sizes[0] < 0.6 * sizes[1]
    for name, value in load_stage(half).denoiser.state_dict().items():
        expected = stage.denoiser.state_dict()[name].to(getattr(torch, dtype)).float()
        assert torch.equal(value, expected), name


def test_weights_of_another_shape_are_rejected(stage, tmp_path):
    weights = stage.denoiser.state_dict()
    weights["network.embed0.bias"] = weights["network.embed0.bias"] + 1e5
    with pytest.raises(UserError, match=r"network\.embed0\.bias .* too large for float16: use bfloat16"):
        export_stage(stage.info.config, weights, tmp_path / "a", dtype="float16")
    export_stage(stage.info.config, weights, tmp_path / "b", dtype="bfloat16")
    weights["network.embed0.bias"] = weights["network.embed0.bias"] * float("inf")
    with pytest.raises(UserError, match="not finite"):
        export_stage(stage.info.config, weights, tmp_path / "a")
    with pytest.raises(UserError, match="dtype=float8: use one of float32"):
        export_stage(stage.info.config, weights, tmp_path / "a", dtype="float8")
    assert not (tmp_path / "a").exists()


def test_an_interrupted_export_is_not_read(stage, exported, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_stage(stage.info.config, stage.denoiser.state_dict(), exported, dtype="float16")
    refused(exported, "incomplete export", "stage.json is missing")


def test_destinations_of_an_export(stage, exported, tmp_path):
    again = export_stage(stage.info.config, stage.denoiser.state_dict(), exported, images_seen=1)
    assert load_stage(again).images_seen == 1  # replaced
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for used in (tmp_path / "run", exported / "stage.json"):
        with pytest.raises(UserError, match="destination="):
            export_stage(stage.info.config, stage.denoiser.state_dict(), used)


def test_damaged_exports(exported):
    weights, file = exported / "weights.safetensors", exported / "stage.json"
    good, text = weights.read_bytes(), file.read_text()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused(weights.parent, "does not hold the weights that stage.json describes")
    for content in (b"", good[:4], good[:2000], good[:-4], b"\xff" * 8 + good[8:], good[:8] + b"{{" + good[10:]):
        weights.write_bytes(content)
        file.write_text(text.replace(json.loads(text)["weights"]["sha256"], file_sha256(weights)))
        refused(exported, "cannot be read: it is damaged")
    save_file({"network.other": torch.zeros(1)}, weights)
    file.write_text(text.replace(json.loads(text)["weights"]["sha256"], file_sha256(weights)))
    refused(exported, "do not fit the network")
    weights.unlink()
    refused(exported, "weights.safetensors is missing")


def test_damaged_descriptions(exported):
    file = exported / "stage.json"
    text = file.read_text()
    for position in range(0, len(text) - 2, 41):
        file.write_text(text[:position])
        refused(exported, "damaged")
    for old, new in (
        ('"images_seen": 640', '"images_seen": "many"'),
        ('"kind": "ema"', '"kind": "best"'),
        ('"stage_config": {', '"stage_konfig": {'),
        ('".float": "inf"', '".float": []'),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        refused(exported, "damaged")
    file.write_text("[" * 100_000)
    refused(exported, "damaged")
    file.write_text(
        text.replace('"_target_": "relay_diffusion.networks.EDM', '"target": "relay_diffusion.networks.EDM')
    )
    refused(exported, "must be an EDMPreconditioner")
    file.write_text(text.replace('"format": 1', '"format": 2'))
    refused(exported, "in format 2: this version reads 1")


@pytest.mark.parametrize("source", [EDM, TRAINING_STATE], ids=["pkl", "pt"])
def test_published_checkpoints_become_stages(reference, source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(PROJECT)
    assert tool(f"source={source}", f"destination={tmp_path / 'stage'}") == 0
    printed = capsys.readouterr().out.splitlines()
    said = {
        EDM: "8x8, starts from noise, 10 classes, no augmentation labels",
        TRAINING_STATE: "16x16, starts from noise, no classes, 9 augmentation labels",
    }
    assert len(printed) == 1
    assert said[source] in printed[0]
    assert str(tmp_path / "stage") in printed[0]
    stage, v = load_stage(tmp_path / "stage", changes={"sampler": {"steps": 3}}), reference(f"{source.stem}_output")
    labels = class_indices(v["labels"]) if "labels" in v else None
    with torch.no_grad():
        denoised = stage.denoiser(v["x"], v["sigma"], labels)
    torch.testing.assert_close(denoised, v["denoised"], atol=1e-4 * v["denoised"].abs().max().item(), rtol=0)
    assert stage.sample(v["x"].shape, [0, 1], labels).isfinite().all()
    content = json.loads((tmp_path / "stage/stage.json").read_text())
    assert content["origin"] == {"file": source.name, "sha256": file_sha256(source)}


def test_the_rest_of_a_stage_is_that_of_an_experiment(tmp_path, monkeypatch):
    shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    header = "# @package _global_\ndefaults: [{override /stage: relay}]\nresolution: 16\n"
    network = "network: {channels: 8, channel_mult: [1, 2], blocks: 1, dropout: 0.7}\n"
    (tmp_path / "conf/experiment/mine.yaml").write_text(header + network + "stage: {denoiser: {sigma_data: 0.4}}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert_checkpoint, "CONF", tmp_path / "conf")
    assert tool(f"source={TRAINING_STATE}", "destination=relay", "experiment=mine", "dtype=bfloat16") == 0
    stage = load_stage("relay")
    assert stage.corruption.block == 4
    assert stage.denoiser.sigma_data == stage.loss.sigma_data == 0.5  # the file's, as its dropout
    assert stage.info.config["denoiser"]["network"]["dropout"] == 0.2
    assert stage.sample((1, 3, 16, 16), [0], previous=torch.zeros(1, 3, 4, 4)).isfinite().all()


def test_the_loss_of_a_file_sets_the_noise(tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    content, mean = EDM.read_bytes(), b"P_mean\x94G" + b"\xbf\xf3\x33\x33\x33\x33\x33\x33"
    assert mean in content
    path = tmp_path / "other.pkl"
    path.write_bytes(content.replace(mean, mean[:8] + b"\xbf\xe0" + bytes(6)))
    assert convert.published_stage(path, convert_checkpoint.compose_stage(None)).corruption.schedule.p_mean == -0.5
    rewritten(EDM, path, EDMLoss="VELoss")
    with pytest.raises(UserError, match="was trained with VELoss: give experiment=NAME"):
        convert.published_stage(path, convert_checkpoint.compose_stage(None))


def test_the_label_dropout_of_a_published_file_is_kept(monkeypatch):
    monkeypatch.chdir(PROJECT)
    stage = convert_checkpoint.compose_stage(None)
    published = convert.read_published(EDM)
    assert published.label_dropout == convert.published_stage(EDM, stage).label_dropout == 0
    monkeypatch.setattr(
        convert, "read_published", lambda path: dataclasses.replace(published, path=path, label_dropout=0.1)
    )
    assert (
        convert.published_stage(EDM, convert_checkpoint.compose_stage(None)).label_dropout == 0.1
    )  # so that guidance is accepted


def test_checkpoints_of_this_project_are_exported(stage, tmp_path, capsys):
    average = {name: torch.randn_like(value) for name, value in stage.denoiser.state_dict().items()}
    checkpoint = {"stage_config": stage.info.config, "state_dict": stage.state_dict(), "ema": {"weights": average}}
    (tmp_path / "run").mkdir()
    torch.save(checkpoint | {"class_names": ["dark", "light"], "images_seen": 64}, tmp_path / "run/last.ckpt")
    assert tool(f"source={tmp_path / 'run'}", f"destination={tmp_path / 'shared'}") == 0
    assert "16x16, starts from noise, 2 classes, no augmentation labels, float32" in capsys.readouterr().out
    for name, value in load_file(tmp_path / "shared/weights.safetensors").items():
        assert torch.equal(value, average[name]), name
    shared = load_stage(tmp_path / "shared")
    assert (shared.info.class_names, shared.images_seen) == (["dark", "light"], 64)
    assert tool(f"source={tmp_path / 'shared'}", f"destination={tmp_path / 'half'}", "dtype=float16") == 0
    assert load_stage(tmp_path / "half").images_seen == 64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["source={text}", "destination={out}"], "neither a pickle"),
        (["source={ckpt}", "destination={out}"], "plain values; give a checkpoint of train.py"),
        (["source={tmp}/missing.pt", "destination={out}"], "does not exist"),
        (["source={tmp}/missing", "destination={out}"], "no checkpoint at"),
        (["source={edm}"], "missing: destination=..."),
        (["source={edm}", "destination={out}", "dtype=int8"], "int8"),
        (["source={edm}", "destination={out}", "experiment=nothing"], "unknown choice experiment=nothing; available: "),
        (["source={edm}", "destination={out}", "experiment=emoji_64"], "resolution=64 (the file: 8), channels=64"),
        (["source={tmp}", "destination={out}", "experiment=emoji_64"], "leave experiment out"),
        (["source={edm}", "destination={text}"], "is a file"),
        (["source={edm}", "destination={edm}"], "is the source; choose"),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(PROJECT)
    (tmp_path / "text.pkl").write_text("hello")
    (tmp_path / "text.ckpt").write_text("hello")
    places = {
        "text": tmp_path / "text.pkl",
        "ckpt": tmp_path / "text.ckpt",
        "tmp": tmp_path,
        "out": tmp_path / "out",
        "edm": EDM,
    }
    assert tool(*(argument.format(**places) for argument in arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "out").exists()


def test_published_files_are_converted_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tool(f"source={EDM}", "destination=out") == 0
    assert load_stage("out").sampler.evaluations == 47


def test_the_command(tmp_path):
    result = run("-m relay_diffusion.cli.convert_checkpoint", "source=Makefile", f"destination={tmp_path / 'out'}")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [result.stderr.strip()]
    assert "Makefile" in result.stderr
