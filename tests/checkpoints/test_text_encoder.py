"""The text encoder that checkpoints and exports name."""

import json
import shutil

import pytest
import torch

from relay_diffusion.checkpoints import load_stage, load_text_encoder, targets
from relay_diffusion.checkpoints.loading import read_checkpoint
from relay_diffusion.cli.convert_checkpoint import ConvertOptions, convert
from relay_diffusion.errors import UserError
from relay_diffusion.models.stage import StageInfo
from relay_diffusion.text import TransformersEncoder, encoder_folder, transformers_encoder
from tiny_encoders import save_encoder

TARGET = "relay_diffusion.text.TransformersEncoder"
PROMPTS = ["a red fox", "", "traffic light"]


@pytest.fixture
def folder(tmp_path):
    return save_encoder(tmp_path / "bert", "bert")


@pytest.fixture
def info(folder):
    """Metadata of a stage that was trained with the encoder in `folder`."""
    encoder = {"_target_": TARGET, "path": str(folder), "max_tokens": 10}
    text = {"encoder": encoder, "hash": TransformersEncoder(folder, 10).hash}
    return StageInfo(origin={"file": "runs/last.ckpt"}, text=text)


def changed(info, **changes):
    """The metadata with another config of the encoder; a value of ... removes a key."""
    encoder = {name: value for name, value in (info.text["encoder"] | changes).items() if value is not ...}
    return StageInfo(origin=info.origin, text=info.text | {"encoder": encoder})


def assert_encodes(encoder, folder):
    for one, other in zip(encoder.encode(PROMPTS), TransformersEncoder(folder, 10).encode(PROMPTS), strict=True):
        assert torch.equal(one, other)


def test_checkpoints_and_exports_name_the_encoder(fit, tmp_path, text_options):
    trained = fit("run", 4, *text_options)
    folder = text_options[1].partition("=")[2]
    config = {"_target_": TARGET, "path": folder, "max_tokens": 10, "batch_size": 1}
    text = {"encoder": config, "hash": TransformersEncoder(folder, 10).hash}
    assert trained.info.text == load_stage(tmp_path / "run").info.text == text
    assert read_checkpoint(tmp_path / "run")["text"] == text
    convert(ConvertOptions(str(tmp_path / "run"), str(tmp_path / "export")))
    assert json.loads((tmp_path / "export/stage.json").read_text())["text"] == text
    for name in ("run", "export"):
        stage = load_stage(tmp_path / name)
        assert stage.info.text == text
        encoder = load_text_encoder(stage.info)
        assert encoder.dim == stage.text_dim
        assert_encodes(encoder, folder)


def test_stages_without_text_name_no_encoder(fit, tmp_path):
    fit("run", 4)
    convert(ConvertOptions(str(tmp_path / "run"), str(tmp_path / "export")))
    assert "text" not in json.loads((tmp_path / "export/stage.json").read_text())
    assert "text" not in torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    for name in ("run", "export"):
        with pytest.raises(UserError, match=rf"{name}.*: names no text encoder, so it was trained without text"):
            load_text_encoder(load_stage(tmp_path / name).info)


def test_the_weights_of_the_encoder_are_loaded_when_it_encodes(info, monkeypatch):
    monkeypatch.setattr(transformers_encoder, "_load_model", lambda *_: pytest.fail("the weights were loaded"))
    load_text_encoder(info)


def test_a_note_shows_a_stored_folder(info, folder, capsys):
    load_text_encoder(info)
    assert capsys.readouterr().out == f"note: text encoder {folder} (named in runs/last.ckpt)\n"


def test_a_copy_in_another_place(info, folder, tmp_path, capsys):
    shutil.move(folder, tmp_path / "moved")
    message = (
        r"^runs/last\.ckpt was trained with the text encoder .*/bert, which is no folder here: give text\.path=.*/bert"
    )
    with pytest.raises(UserError, match=message):
        load_text_encoder(info)
    assert_encodes(load_text_encoder(info, str(tmp_path / "moved")), tmp_path / "moved")
    assert capsys.readouterr().out == ""


def test_a_name_on_the_hub_is_not_downloaded_for_a_checkpoint(info, monkeypatch):
    asked = []

    def downloaded(name, option):
        asked.append(name)
        raise UserError(f"{option}={name}: no network")

    monkeypatch.setattr(encoder_folder, "_downloaded", downloaded)
    hub = changed(info, path="someone/encoder")
    with pytest.raises(
        UserError, match=r"encoder someone/encoder, which is no folder here: give mine\.path=someone/encod"
    ):
        load_text_encoder(hub, option="mine.path")
    assert asked == []
    with pytest.raises(UserError, match="no network"):
        load_text_encoder(hub, "someone/encoder")
    assert asked == ["someone/encoder"]


def test_the_installed_encoder_needs_no_path(info, folder, monkeypatch, capsys):
    monkeypatch.setattr(encoder_folder, "_installed", lambda _: folder)
    assert_encodes(load_text_encoder(changed(info, path=None)), folder)
    assert capsys.readouterr().out == ""


def test_another_encoder_is_an_error_that_names_both(info, tmp_path):
    other = save_encoder(tmp_path / "other", "bert", seed=1)
    settings = r"TransformersEncoder\(path=.*/{}, max_tokens=10\), hash "
    message = (
        r"^runs/last\.ckpt was trained with another text encoder: " + settings.format("bert") + info.text["hash"][:12]
    )
    message += r" there, " + settings.format("other") + "[0-9a-f]{12} here; use the files and the text.max_tokens"
    with pytest.raises(UserError, match=message):
        load_text_encoder(info, str(other))
    with pytest.raises(UserError, match=r"hash [0-9a-f]{12} there, .*, hash [0-9a-f]{12} here"):
        load_text_encoder(changed(info, max_tokens=9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_target_": "os.system"}, r"names 'os\.system', which is not a class of relay_diffusion: refused"),
        ({"_target_": "relay_diffusion.text.os.system"}, r"names relay_diffusion\.text\.os\.system, which is not"),
        ({"_target_": "relay_diffusion.data.ImageDataset"}, r"names .*ImageDataset, which is not a text encoder"),
        ({"_target_": "relay_diffusion.text.CachedEncoder"}, r"names .*CachedEncoder, which is not a text encoder"),
        ({"_target_": ...}, r"names None, which is not a text encoder: refused"),
        ({"_target_": 3}, r"names '3', which is not a class"),
        ({"path": {"_target_": "os.system"}}, r"names 'os\.system', which is not a class of relay_diffusion"),
        ({"path": "${oc.env:HOME}"}, r"holds a config with an interpolation"),
        ({"path": ..., "_args_": ["someone/encoder"]}, r"holds a text encoder with _args_: refused"),
        ({"_partial_": True}, r"holds a text encoder with _partial_: refused"),
        ({"path": "x" * 5000}, r"trained with the text encoder xxx.*\.\.\., which is no folder here"),
        ({"path": "a\0b"}, r"which is no folder here"),
        ({"path": ["a"]}, r"which is no folder here"),
        ({"max_tokens": 10**9}, r"text\.max_tokens=1000000000: the encoder takes"),
        ({"max_tokens": "many"}, r"the text encoder of runs/last\.ckpt cannot be built"),
        ({"unknown": 1}, r"the text encoder of runs/last\.ckpt cannot be built: .*unknown"),
    ],
)  # fmt: skip
def test_hostile_configs_are_refused(info, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load_text_encoder(changed(info, **changes))
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [None, [], "minilm", {}, {"encoder": {}}, {"encoder": [], "hash": "a"}, {"encoder": {}, "hash": 1},
     {"encoder": {}, "hash": "a", "more": 1}, {"encoder": {"path": torch.zeros(1)}, "hash": "a"}],
)  # fmt: skip
def test_damaged_checkpoints_are_refused(fit, tmp_path, text):
    fit("run", 4)
    path = tmp_path / "run/checkpoints/last.ckpt"
    torch.save(torch.load(path, weights_only=True) | {"text": text}, path)
    for read in (load_stage, read_checkpoint):
        with pytest.raises(UserError, match=r"last\.ckpt is damaged: text") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_an_encoder_of_another_package_needs_trust(info):
    other = changed(info, _target_="tiny_encoders.Bert")
    with pytest.raises(UserError, match=r"names 'tiny_encoders\.Bert', .* add trusted=\[tiny_encoders\]"):
        load_text_encoder(other)
    assert type(load_text_encoder(other, trusted=["tiny_encoders"])).__name__ == "Bert"


def test_renamed_classes_are_translated(fit, tmp_path, text_options, monkeypatch):
    fit("run", 4, *text_options)
    path = tmp_path / "run/checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    content["text"]["encoder"]["_target_"] = "relay_diffusion.old.Encoder"
    torch.save(content, path)
    monkeypatch.setitem(targets.RENAMED, "relay_diffusion.old.Encoder", TARGET)
    assert load_stage(path).info.text["encoder"]["_target_"] == TARGET
