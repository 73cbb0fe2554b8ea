"""Publish relays to folders and to the Hugging Face Hub."""

import json
import shutil

import pytest
import torch
from PIL import Image

import relay_diffusion as rd
from hub_server import Repository
from relay_diffusion import __version__
from relay_diffusion.cli import publish as publish_module
from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.cli.publish import USAGE, PublishOptions
from relay_diffusion.utils.files import file_sha256
from support import assert_same_weights

WRITTEN = ["README.md", "base/stage.json", "base/weights.safetensors", "relay.json", "relay/stage.json",
           "relay/weights.safetensors"]  # fmt: skip


def tool(**options):
    arguments = [f"{key}={value}" for key, value in options.items()]
    return run_tool(arguments, USAGE, PublishOptions, publish_module._publish_and_report)


@pytest.fixture
def refused(capsys):
    """Run the tool, expect one line on standard error and exit code 2; return the line."""

    def run(**options):
        capsys.readouterr()  # of earlier calls
        assert tool(**options) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.count("\n") == 1
        return output.err.removeprefix("error: ").strip()

    return run


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def card(text):
    from huggingface_hub import ModelCard

    return ModelCard(text)


@pytest.fixture
def unreachable(monkeypatch):
    """Any request to the Hub is an error."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("unreachable")
def test_consistency_is_published(relay_folder, tmp_path):
    source = shutil.copytree(relay_folder, tmp_path / "source")
    content = json.loads((source / "relay.json").read_text()) | {"consistency": True}
    (source / "relay.json").write_text(json.dumps(content))
    assert tool(source=source, destination=tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/relay.json").read_text()) == content
    assert rd.load_relay(tmp_path / "out").consistency


@pytest.mark.usefixtures("unreachable")
def test_a_folder(relay_folder, tmp_path, capsys):
    assert tool(source=relay_folder, destination=tmp_path / "out/tiny", license="mit", tags="a,b", datasets="u/d") == 0
    first, load, app = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path}/out/tiny: stages base, relay, ")
    assert load == f'load: relay_diffusion.load_relay("{tmp_path}/out/tiny")'
    assert app == f"web app: python -m relay_diffusion.cli.app relay={tmp_path}/out/tiny"
    assert names(tmp_path) == [f"out/tiny/{name}" for name in WRITTEN]
    relay, local = rd.load_relay(tmp_path / "out/tiny"), rd.load_relay(relay_folder)
    assert_same_weights(relay.state_dict(), local.state_dict())
    assert relay.class_names == ["dark", "light"]
    assert torch.equal(relay.sample([1], labels=[0]), local.sample([1], labels=[0]))
    readme = card((tmp_path / "out/tiny/README.md").read_text())
    assert readme.data.to_dict() == {
        "license": "mit",
        "library_name": "relay-diffusion",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["relay-diffusion", "diffusion", "a", "b"],
        "datasets": ["u/d"],
    }
    assert "\nImages of 16x16 by " in readme.text
    assert f", made with relay-diffusion {__version__}.\n" in readme.text
    assert "\n# tiny\n" in readme.text
    assert 'relay = load_relay("tiny")\nimages = relay.sample(range(4), labels=0)' in readme.text
    assert "\n2 classes: dark, light.\n" in readme.text
    assert str(tmp_path) not in str(readme)
    assert card((tmp_path / "out/tiny/README.md").read_text()).content.count("---\n") == 2


@pytest.mark.usefixtures("unreachable")
def test_defaults_of_the_card(relay_folder, tmp_path):
    assert tool(source=relay_folder, destination=tmp_path / "tiny", dtype="bfloat16") == 0
    readme = card((tmp_path / "tiny/README.md").read_text())
    assert readme.data.license == "unknown"
    assert (readme.data.datasets, readme.data.metrics) == (None, None)
    assert "## Evaluation" not in readme.text
    rows = [line for line in readme.text.splitlines() if line.startswith(("| base", "| relay"))]
    assert rows[0].startswith("| base | 8x8 | noise | ")
    assert rows[1].startswith("| relay | 16x16 | images 2 times smaller | ")
    assert all(row.endswith("| 640 | bfloat16 |") for row in rows)
    assert json.loads((tmp_path / "tiny/base/stage.json").read_text())["weights"]["dtype"] == "bfloat16"


@pytest.mark.usefixtures("unreachable")
def test_sources(relay_folder, tmp_path):
    stages = f"base={relay_folder / 'base'},relay={relay_folder / 'relay'}"
    assert tool(source=stages, destination=tmp_path / "stages") == 0
    assert_same_weights(rd.load_relay(tmp_path / "stages").state_dict(), rd.load_relay(relay_folder).state_dict())
    assert tool(source=relay_folder / "base", destination=tmp_path / "base") == 0
    assert list(rd.load_relay(tmp_path / "base").chain()) == ["base"]
    assert tool(source=relay_folder / "relay", destination=tmp_path / "relay") == 0
    relay = rd.load_relay(tmp_path / "relay")
    assert list(relay.chain()) == ["relay"]
    readme = card((tmp_path / "relay/README.md").read_text())
    assert readme.data.pipeline_tag == "image-to-image"
    assert "relay.sample(range(4), start=images, labels=0)" in readme.text


@pytest.mark.slow
@pytest.mark.usefixtures("unreachable")
def test_a_training_run(fit, tmp_path):
    fit("run", 8)
    assert tool(source=tmp_path / "run", destination=tmp_path / "out") == 0
    published = rd.load_relay(tmp_path / "out").chain()["base"]
    assert_same_weights(published.state_dict(), rd.load_stage(tmp_path / "run").state_dict())
    assert published.info.images_seen == 8


@pytest.mark.usefixtures("unreachable")
def test_a_picture(relay_folder, tmp_path, refused):
    picture = tmp_path / "picture.jpg"
    Image.effect_noise((20, 10), 40).convert("RGB").save(picture, comment=b"where it was taken")
    assert tool(source=relay_folder, destination=tmp_path / "tiny", image=picture) == 0
    assert "![samples](samples.png)" in (tmp_path / "tiny/README.md").read_text()
    with Image.open(tmp_path / "tiny/samples.png") as image:
        assert image.size == (20, 10)
        assert not image.info
    for bad in (relay_folder / "relay.json", tmp_path / "none.png", tmp_path):
        message = refused(source=relay_folder, destination=tmp_path / "other", image=bad)
        assert message.startswith(f"image={bad}")
    assert not (tmp_path / "other").exists()


def measured(relay_folder, file, **changes):
    """Write a metrics.json as sample.py does."""
    stages = {
        name: {
            "sha256": file_sha256(relay_folder / name / "stage.json"),
            "network_evaluations": n,
            "guidance_scale": 1.5,
        }
        for name, n in (("base", 7), ("relay", 9))
    }
    content = {
        "settings": {"stages": stages},
        "images": 5000,
        "fid": 12.346,
        "precision": 0.5,
        "warnings": ["few images"],
        "departures": [],
        "reference": {"path": "/home/me/data/mine.zip", "subset": ""},
        "evaluation": {"protocol": {"name": "adm"}},
    }
    file.write_text(json.dumps(content | changes))
    return file


@pytest.mark.usefixtures("unreachable")
def test_metrics(relay_folder, tmp_path):
    file = measured(relay_folder, tmp_path / "metrics.json")
    assert tool(source=relay_folder, destination=tmp_path / "tiny", metrics=file) == 0
    readme = card((tmp_path / "tiny/README.md").read_text())
    assert readme.data.metrics == ["fid", "precision"]
    assert "| FID | 12.35 |\n| precision | 0.500 |\n" in readme.text
    assert (
        "\n5,000 images; reference mine.zip; protocol adm; base: 7 network evaluations, guidance scale 1.5; relay: 9 "
        "network evaluations, guidance scale 1.5.\n\nfew images\n" in readme.text
    )
    assert "/home/me" not in str(readme)


@pytest.mark.usefixtures("unreachable")
def test_metrics_that_are_refused(relay_folder, tmp_path, refused):
    options = {"source": relay_folder, "destination": tmp_path / "tiny", "metrics": tmp_path / "metrics.json"}
    other = {"settings": {"stages": {"base": {"sha256": "0" * 64}}}}
    measured(relay_folder, options["metrics"], **other)
    assert refused(**options) == (
        f"metrics={options['metrics']}: its stage base had other weights; evaluate this relay, or leave metrics out"
    )
    for change in ({"fid": "low"}, {"fid": {".float": "nan"}}, {"images": True}, {"images": None}, {"fid": [1]}):
        measured(relay_folder, options["metrics"], **change)
        assert "cannot be read; give the metrics.json of a run" in refused(**options)
    for text in ("", "[]", "{}", "{", '{"images": 5}'):
        options["metrics"].write_text(text)
        assert "cannot be read; give the metrics.json of a run" in refused(**options)
    options["metrics"].unlink()
    assert "cannot be read; give the metrics.json of a run" in refused(**options)
    assert not options["destination"].exists()


@pytest.mark.usefixtures("unreachable")
def test_overwriting_a_folder(relay_folder, tmp_path, refused):
    options = {"source": relay_folder, "destination": tmp_path / "tiny"}
    options["destination"].mkdir()
    assert tool(**options) == 0  # the folder was empty
    assert "relay.json: exists already; choose another name, or overwrite=true" in refused(**options)
    assert tool(**options | {"source": relay_folder / "relay"}, overwrite="true") == 0
    assert names(tmp_path / "tiny") == [name for name in WRITTEN if not name.startswith("base/")]
    (tmp_path / "tiny/relay/mine.txt").write_text("precious")
    assert "also holds" in refused(**options, overwrite="true")
    assert (tmp_path / "tiny/relay/mine.txt").read_text() == "precious"
    shutil.rmtree(tmp_path / "tiny")
    shutil.copytree(relay_folder / "base", tmp_path / "tiny/base")  # exports without relay.json are not of this tool
    assert "also holds" in refused(**options, overwrite="true")
    shutil.rmtree(tmp_path / "tiny")
    (tmp_path / "tiny").write_text("precious")
    assert "is a file; give the name of a folder" in refused(**options)
    assert names(tmp_path) == ["tiny"]


@pytest.mark.usefixtures("unreachable")
def test_an_error_keeps_the_earlier_folder(relay_folder, tmp_path, monkeypatch, refused):
    options = {"source": relay_folder, "destination": tmp_path / "tiny"}
    assert tool(**options) == 0
    before = {name: (tmp_path / "tiny" / name).read_bytes() for name in WRITTEN}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish_module, "write_text", fail)
    assert "No space left on device" in refused(**options, overwrite="true", dtype="float16")
    assert {name: (tmp_path / "tiny" / name).read_bytes() for name in names(tmp_path / "tiny")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.usefixtures("unreachable")
def test_sources_that_are_refused(relay_folder, tmp_path, refused):
    content = json.loads((relay_folder / "relay.json").read_text())
    paths = {name: {"path": str(relay_folder / name)} for name in ("base", "relay")}
    (tmp_path / "hostile").mkdir()
    for name in ("../../x", "/etc/x", ".", "..", "a/b", "", "a\nb"):
        stages = {name: paths["base"], "relay": paths["relay"]}
        (tmp_path / "hostile/relay.json").write_text(json.dumps(content | {"stages": stages}))
        assert "make a name; rename it" in refused(source=tmp_path / "hostile", destination=tmp_path / "out")
    for source, reason in (
        ("nowhere", "no checkpoint at nowhere"),
        ("base=nowhere", "no checkpoint at nowhere"),
        (f"base={relay_folder / 'base'},second={relay_folder / 'base'}", "starts from noise, as only the first"),
        (f"base={relay_folder / 'base'},base={relay_folder / 'base'}", "has two stages of one name; rename one"),
        ("hf://user", "is not an address on the Hub"),
    ):
        assert reason in refused(source=source, destination=tmp_path / "out")
    assert names(tmp_path) == ["hostile/relay.json"]


def test_without_the_library(relay_folder, tmp_path, monkeypatch, refused):
    monkeypatch.setattr("relay_diffusion.utils.installed.find_spec", lambda _: None)
    assert refused(source=relay_folder, destination=tmp_path / "out") == (
        f"destination={tmp_path / 'out'} needs the library huggingface_hub: pip install -e '.[hub]'"
    )


@pytest.mark.usefixtures("login")
def test_a_repository(hub, relay_folder, tmp_path, capsys):
    file = measured(relay_folder, tmp_path / "metrics.json")
    assert tool(source=relay_folder, destination="hf://user/tiny", metrics=file) == 0
    repository = hub.repositories["user/tiny"]
    assert len(repository.commits) == 2  # that of its creation, and one with all files
    commit = repository.refs["main"]
    assert capsys.readouterr().out.startswith(f"{hub.url}/user/tiny/commit/{commit}: stages base, relay, ")
    assert sorted(repository.commits[commit]) == [".gitattributes", *WRITTEN]
    assert not repository.private
    relay, local = rd.load_relay("user/tiny"), rd.load_relay(relay_folder)
    assert_same_weights(relay.state_dict(), local.state_dict())
    assert torch.equal(relay.sample([1, 2], labels=[0, 1]), local.sample([1, 2], labels=[0, 1]))
    readme = card(repository.commits[commit]["README.md"].decode())
    assert 'load_relay("user/tiny")' in readme.text
    assert readme.data.metrics == ["fid", "precision"]


@pytest.mark.usefixtures("login")
def test_a_copy_of_a_repository(hub, relay_folder):
    assert tool(source=relay_folder, destination="hf://user/tiny") == 0
    assert tool(source="hf://user/tiny", destination="hf://user/half", dtype="float16") == 0
    assert tool(source="base=hf://user/tiny/base", destination="hf://user/first") == 0
    halves = rd.load_relay("user/half").state_dict()
    assert all(
        torch.equal(value.half().float(), halves[name])
        for name, value in rd.load_relay(relay_folder).state_dict().items()
        if "denoiser" in name
    )
    assert list(rd.load_relay("user/first").chain()) == ["base"]
    assert sorted(hub.repositories) == ["user/first", "user/half", "user/tiny"]


@pytest.mark.usefixtures("login")
def test_overwriting_a_repository(hub, relay_folder, refused):
    options = {"source": relay_folder, "destination": "hf://user/tiny"}
    assert tool(**options) == 0
    repository = hub.repositories["user/tiny"]
    assert refused(**options) == (
        "destination=hf://user/tiny: has a relay.json already; choose another name, or overwrite=true to replace it"
    )
    assert len(repository.commits) == 2
    repository.commit(repository.commits[repository.refs["main"]] | {"LICENSE": b"mine", "base/notes.txt": b"mine"})
    assert tool(**options | {"source": relay_folder / "relay"}, overwrite="true") == 0
    assert len(repository.commits) == 4
    kept = [".gitattributes", "LICENSE", "README.md", "base/notes.txt", "relay.json"]
    assert sorted(repository.commits[repository.refs["main"]]) == [*kept, *WRITTEN[-2:]]


@pytest.mark.usefixtures("login")
def test_branches(hub, relay_folder):
    assert tool(source=relay_folder / "base", destination="hf://user/tiny") == 0
    assert tool(source=relay_folder, destination="hf://user/tiny@next", overwrite="true") == 0
    assert tool(source=relay_folder / "relay", destination="hf://user/tiny@next", overwrite="true") == 0
    repository = hub.repositories["user/tiny"]
    assert list(rd.load_relay("user/tiny").chain()) == ["base"]
    assert list(rd.load_relay("user/tiny@next").chain()) == ["relay"]
    assert 'load_relay("user/tiny@next")' in repository.commits[repository.refs["next"]]["README.md"].decode()


@pytest.mark.usefixtures("login")
def test_private_repositories(hub, relay_folder, tmp_path, refused):
    assert tool(source=relay_folder, destination="hf://user/tiny", private="true") == 0
    assert hub.repositories["user/tiny"].private
    assert tool(source=relay_folder, destination="hf://user/tiny", private="true", overwrite="true") == 0
    hub.repositories["user/public"] = Repository()
    hub.repositories["user/public"].commit({})
    assert refused(source=relay_folder, destination="hf://user/public", private="true") == (
        "destination: private=true: hf://user/public is public; change its settings, or remove private"
    )
    message = refused(source=relay_folder, destination=tmp_path / "out", private="true")
    assert message == f"private=true: destination={tmp_path / 'out'} is a folder; remove private"


def test_publishing_needs_a_login(hub, relay_folder, refused, monkeypatch):
    options = {"source": relay_folder, "destination": "hf://user/tiny"}
    assert refused(**options) == (
        "destination: hf://user/tiny: no access token; log in with `hf auth login` or set HF_TOKEN"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refused(**options)
    assert message.startswith("destination: hf://user/tiny: the Hub answers 401 (")
    assert message.endswith("; log in with `hf auth login` or set HF_TOKEN with a token that may do this")
    assert hub.repositories == {}


@pytest.mark.usefixtures("login")
@pytest.mark.parametrize("step", ["repos/create", "/preupload/", "/commit/"])
def test_an_upload_that_is_refused(hub, relay_folder, refused, step):
    hub.failing = step
    message = refused(source=relay_folder, destination="hf://user/tiny")
    assert message.startswith("hf://user/tiny: the Hub answers 403 (")
    assert "no permission" in message
    for repository in hub.repositories.values():
        assert len(repository.commits) == 1  # that of its creation: nothing of the relay


@pytest.mark.usefixtures("login")
def test_destinations_that_are_refused(hub, relay_folder, refused, monkeypatch):
    for destination, reason in (
        ("hf://user", "is not an address on the Hub"),
        ("hf://user/tiny/folder", "a relay is published to the root of a repository; remove the folder"),
        ("hf://user/a--b", "is not an address on the Hub ("),
    ):
        assert reason in refused(source=relay_folder, destination=destination)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refused(source=relay_folder, destination="hf://user/tiny") == (
        "destination: hf://user/tiny: HF_HUB_OFFLINE is set; unset it"
    )
    assert hub.repositories == {}


@pytest.mark.usefixtures("unreachable")
def test_a_relay_with_text(tmp_path):
    pytest.importorskip("transformers")
    from text_relays import export_text_relay
    from tiny_encoders import save_encoder

    folder = export_text_relay(tmp_path / "relay", save_encoder(tmp_path / "encoder", "bert"))
    source = f"base={folder / 'base'},relay={folder / 'relay'}"
    assert tool(source=source, destination=tmp_path / "out") == 0
    readme = card((tmp_path / "out/README.md").read_text())
    assert readme.data.pipeline_tag == "text-to-image"
    assert 'relay.sample(range(4), prompt="a red fox")' in readme.text
    assert "text_path=FOLDER" in readme.text
    assert rd.load_relay(tmp_path / "out").sample([0], prompt="fox").shape == (1, 3, 16, 16)
