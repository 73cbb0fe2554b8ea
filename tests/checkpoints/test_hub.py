"""Load relays and stages of the Hugging Face Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import relay_diffusion as rd
from hub_server import TOKEN, Repository
from relay_diffusion.checkpoints.hub import HubAddress, parse_address, parse_short_address
from relay_diffusion.cli.convert_checkpoint import ConvertOptions, convert
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.config.train import validate_training
from relay_diffusion.errors import UserError
from relay_diffusion.sampling.run import sample
from support import PROJECT, assert_same_weights

STAGE_FILES = ("stage.json", "weights.safetensors")


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def published(hub, relay_folder):
    """Repository user/tiny with the relay and files that nothing needs; its tag v1."""
    repository = hub.repositories["user/tiny"] = Repository()
    others = {"README.md": b"# tiny", "model.bin": b"pickle", "code.py": b"raise SystemExit", "base/x.pt": b""}
    repository.commit(files_of(relay_folder) | others)
    repository.refs["v1"] = repository.refs["main"]
    return repository


def changed(repository, files):
    """Commit changed files to main; None removes one."""
    content = repository.commits[repository.refs["main"]] | files
    return repository.commit({name: file for name, file in content.items() if file is not None})


def failing(action, *arguments, **options):
    with pytest.raises(UserError) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://user/name", HubAddress("user/name")),
        ("hf://u-1/n.a_me@v1.0/a/b", HubAddress("u-1/n.a_me", "v1.0", "a/b")),
        ("hf://user/name@refs%2Fpr%2F1", HubAddress("user/name", "refs/pr/1")),
        ("hf://user/name@" + "a" * 40 + "/x@y", HubAddress("user/name", "a" * 40, "x@y")),
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address
    assert str(address) == text
    assert parse_address(f"{text}/") == address


@pytest.mark.parametrize(
    "rest",
    ["", "user", "/user/name", "user/name@", "user/name@a@b", "user/na me", "user/name//x", "user/name/../x",
     "user/name/.", "user/name@.", "-u/n", "user/name@..%2F..%2Fx",
     "user/name@%2Fx", "user/name/a\nb", "us:er/name", "user@v1/name", "üser/name"],
)  # fmt: skip
def test_malformed_addresses(rest):
    for action in (rd.load_stage, rd.load_relay, parse_address):
        assert "is not an address on the Hub; write hf://USER/NAME[@REVISION][/FOLDER]" in failing(
            action, f"hf://{rest}"
        )


def test_short_addresses():
    assert parse_short_address("user/name@v1") == HubAddress("user/name", "v1")
    assert [parse_short_address(text) for text in ("emoji", "a/b/c", "/a/b", "../b", "~/b", "a/b@")] == [None] * 6


def test_folders_stay_in_the_repository():
    address = HubAddress("user/name", "v1", "a")
    assert address.inside("b/./c").folder == "a/b/c"
    assert address.inside("../b").folder == "b"
    assert address.inside("..").folder == ""
    for path in ("../..", "../../b", "/etc", "b\nc", "//x"):
        assert "outside the repository: refused" in failing(address.inside, path)


@pytest.mark.parametrize("source", ["user/tiny", "hf://user/tiny@v1"])
@pytest.mark.usefixtures("published")
def test_a_relay_is_the_same_to_the_last_bit(relay_folder, source, hub):
    relay, local = rd.load_relay(source), rd.load_relay(relay_folder)
    assert_same_weights(relay.state_dict(), local.state_dict())
    assert relay.class_names == ["dark", "light"]
    assert torch.equal(relay.sample([1, 2], labels=[0, 1]), local.sample([1, 2], labels=[0, 1]))
    wanted = ["relay.json", *(f"{stage}/{file}" for stage in ("base", "relay") for file in STAGE_FILES)]
    assert hub.downloaded() == wanted
    rd.load_relay(source)
    assert hub.downloaded() == wanted  # the second time they are in the cache


def test_a_relay_in_a_folder(published, relay_folder):
    """A relay.json that names stages beside its folder, as demo/emoji does."""
    paths = {name: {"path": f"../{name}"} for name in ("base", "relay")}
    changed(published, {"chain/relay.json": json.dumps({"format": 1, "stages": paths}).encode(), "relay.json": None})
    relay = rd.load_relay("hf://user/tiny/chain")
    assert_same_weights(relay.state_dict(), rd.load_relay(relay_folder).state_dict())


@pytest.mark.usefixtures("published")
def test_a_stage(relay_folder, hub):
    stage, local = rd.load_stage("hf://user/tiny/base"), rd.load_stage(relay_folder / "base")
    assert_same_weights(stage.state_dict(), local.state_dict())
    assert hub.downloaded() == [f"base/{file}" for file in STAGE_FILES]
    weaker = rd.load_stage(relay_folder / "base", changes={"guidance_scale": 2}, guide="hf://user/tiny/base")
    assert_same_weights(weaker.guide.state_dict(), local.denoiser.state_dict())
    relay = rd.load_relay({"base": "hf://user/tiny@v1/base", "relay": relay_folder / "relay"})
    assert_same_weights(relay.state_dict(), rd.load_relay(relay_folder).state_dict())


def test_a_stage_at_the_root(hub, relay_folder):
    hub.repositories["user/stage"] = Repository()
    hub.repositories["user/stage"].commit(files_of(relay_folder / "base"))
    stage = rd.load_stage("hf://user/stage")
    assert_same_weights(stage.state_dict(), rd.load_stage(relay_folder / "base").state_dict())


def test_all_files_are_of_one_commit(published, hub, monkeypatch, relay_folder):
    """Somebody publishes another relay during the download."""
    find = Repository.find

    def moving(self, revision):
        found = find(self, revision)
        if hub.downloaded() == ["relay.json"]:
            self.commit({"relay.json": b"{}"})
        return found

    monkeypatch.setattr(Repository, "find", moving)
    relay = rd.load_relay("user/tiny")
    assert_same_weights(relay.state_dict(), rd.load_relay(relay_folder).state_dict())
    assert len(published.commits) > 1


def test_revisions(published):
    second = changed(published, {"relay.json": b'{"format": 2}'})
    rd.load_relay("user/tiny@v1")
    assert "in format 2: this version reads 1" in failing(rd.load_relay, f"user/tiny@{second}")
    message = failing(rd.load_relay, "user/tiny@v2")
    assert "hf://user/tiny@v2: the repository has no revision v2; give one of its branches, tags or commits" in message


@pytest.mark.usefixtures("published")
def test_a_local_folder_takes_precedence(relay_folder, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("user").mkdir()
    Path("user/tiny").symlink_to(relay_folder)
    rd.load_relay("user/tiny")
    assert hub.requests == []
    rd.load_relay("hf://user/tiny")
    assert hub.requests != []
    Path("user/empty").mkdir()
    count = len(hub.requests)
    assert "no relay at user/empty: give a folder with relay.json" in failing(rd.load_relay, "user/empty")
    assert "no relay at user/tiny2" in failing(rd.load_relay, Path("user/tiny2"))
    assert len(hub.requests) == count  # neither is looked up


def test_what_the_hub_does_not_have(published):
    assert failing(rd.load_relay, "user/typo") == (
        "no relay at user/typo: hf://user/typo: the Hub has no such repository, or it is private; check the name, or "
        "log in with `hf auth login` or set HF_TOKEN"
    )
    assert failing(rd.load_stage, "hf://user/tiny/third") == (
        "hf://user/tiny/third: the repository has no file third/stage.json; check the folder and the revision"
    )
    commit = changed(published, {"base/weights.safetensors": None})
    message = failing(rd.load_relay, "user/tiny")
    assert message.startswith(f"hf://user/tiny: stages.base: hf://user/tiny@{commit}/base: the repository has no file")


def test_a_gated_repository(published, hub):
    published.gated = True
    assert failing(rd.load_relay, "hf://user/tiny") == (
        f"hf://user/tiny: access to the repository is restricted; accept its conditions on {hub.url}/user/tiny and log "
        "in with `hf auth login` or set HF_TOKEN"
    )


def test_a_private_repository(published, monkeypatch):
    published.private = True
    assert "or it is private; check the name, or log in" in failing(rd.load_stage, "hf://user/tiny/base")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    rd.load_stage("hf://user/tiny/base")


@pytest.mark.usefixtures("published")
def test_offline(hub, monkeypatch):
    rd.load_relay("user/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    count = len(hub.requests)
    rd.load_relay("user/tiny")
    rd.load_stage("hf://user/tiny/relay")
    message = failing(rd.load_relay, "user/tiny@v1")
    assert "hf://user/tiny@v1: relay.json is not in the cache: HF_HUB_OFFLINE is set; unset it" in message
    assert len(hub.requests) == count


@pytest.mark.usefixtures("published")
def test_no_network(monkeypatch):
    rd.load_relay("user/tiny")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}")
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits before it tries again
    rd.load_relay("user/tiny")
    message = failing(rd.load_relay, "user/other")
    assert "hf://user/other: relay.json is not in the cache: the transfer failed (" in message
    assert message.endswith("; check the network and the disk")


@pytest.mark.parametrize("path", ["../../x", "/etc", "base/../../x"])
def test_a_relay_that_names_files_outside_its_repository(published, path, hub):
    changed(published, {"relay.json": json.dumps({"format": 1, "stages": {"base": {"path": path}}}).encode()})
    assert f"names the folder {path}, which is outside the repository: refused" in failing(rd.load_relay, "user/tiny")
    assert hub.downloaded() == ["relay.json"]


@pytest.mark.parametrize("path", ["hf://user/tiny/base", 7, None, ["base"]])
def test_a_relay_of_the_hub_names_folders_only(published, path, hub):
    changed(published, {"relay.json": json.dumps({"format": 1, "stages": {"base": {"path": path}}}).encode()})
    failing(rd.load_relay, "user/tiny")
    assert hub.downloaded() == ["relay.json"]


@pytest.mark.usefixtures("published")
def test_a_local_relay_causes_no_download(hub, tmp_path):
    stages = {"base": {"path": "hf://user/tiny/base"}}
    (tmp_path / "relay.json").write_text(json.dumps({"format": 1, "stages": stages}))
    assert "no checkpoint at" in failing(rd.load_relay, tmp_path)
    assert hub.requests == []


def test_hostile_files_are_refused(published):
    """The checks of local files hold for those of the Hub."""
    stage = json.loads(published.commits[published.refs["main"]]["base/stage.json"])
    stage["stage_config"]["loss"]["_target_"] = "os.system"
    changed(published, {"base/stage.json": json.dumps(stage).encode()})
    assert "names 'os.system'" in failing(rd.load_stage, "hf://user/tiny/base")
    assert "names 'os.system'" in failing(rd.load_relay, "user/tiny")
    assert "does not hold the weights that stage.json describes" in failing(
        rd.load_stage, f"hf://user/tiny@{changed(published, {'relay/weights.safetensors': b'x'})}/relay"
    )


def test_without_the_library(monkeypatch, configuration):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    needs = "needs the library huggingface_hub: pip install -e '.[hub]'"
    assert failing(rd.load_stage, "hf://user/tiny/base") == f"hf://user/tiny/base {needs}"
    assert failing(rd.load_relay, "user/tiny") == f"no relay at user/tiny: hf://user/tiny {needs}"
    cfg = configuration("sample", "relay=emoji", "relay.stages.base.path=hf://user/tiny/base")
    assert failing(validate_sampling, cfg) == f"relay.stages.base.path: hf://user/tiny/base {needs}"


@pytest.mark.parametrize(
    ("name", "key", "options", "validate"),
    [
        ("sample", "relay.stages.base.path", ["relay=emoji"], validate_sampling),
        ("sample", "relay.stages.relay.guide", ["relay=emoji"], validate_sampling),
        ("train", "init", ["data.dataset.path=demo"], validate_training),
    ],
)
def test_options_with_a_malformed_address(configuration, name, key, options, validate, monkeypatch):
    monkeypatch.chdir(PROJECT)
    message = failing(validate, configuration(name, *options, f"{key}=hf://user"))
    assert message.startswith(f"{key}: hf://user is not an address on the Hub; write hf://USER/NAME")


@pytest.mark.slow
@pytest.mark.usefixtures("published")
def test_training_starts_from_a_stage_of_the_hub(fit, capsys):
    fit("run", 8, "init=hf://user/tiny/relay", stage="relay")
    assert "relay/stage.json" in capsys.readouterr().out


@pytest.mark.usefixtures("published")
def test_an_export_of_the_hub(relay_folder, tmp_path):
    convert(ConvertOptions("hf://user/tiny/base", str(tmp_path / "copy")))
    copied = rd.load_stage(tmp_path / "copy")
    assert_same_weights(copied.state_dict(), rd.load_stage(relay_folder / "base").state_dict())


@pytest.fixture
def sampling(configuration, tmp_path):
    """Validate and sample what sample.py with these overrides does."""

    def run(*overrides):
        cfg = configuration("sample", "relay=two_stages", *overrides, f"output={tmp_path / 'images'}")
        validate_sampling(cfg)
        return sample(cfg)

    return run


@pytest.mark.slow
@pytest.mark.usefixtures("published")
def test_the_command_line(hub, tmp_path, sampling, monkeypatch):
    """In a new interpreter, because settings of huggingface_hub are environment variables."""
    paths = [f"relay.stages.{name}.path=hf://user/tiny@v1/{name}" for name in ("base", "relay")]
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(
        [sys.executable, "sample.py", "relay=two_stages", "seeds=0-1", *paths, f"output={tmp_path / 'images'}"],
        cwd=PROJECT,
        env={key: value for key, value in os.environ.items() if not key.startswith("HF_")} | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "images/images").rglob("*.png"))) == 2
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert sampling(*paths, "seeds=2", "trainer.accelerator=cpu")["sampled_now"] == 1


@pytest.mark.usefixtures("published")
def test_errors_of_sampling_name_the_option(sampling):
    for address, reason in (("user/typo", "no such repository"), ("user/tiny/x", "no file x/stage.json")):
        paths = ["relay.stages.base.path=hf://user/tiny@v1/base", f"relay.stages.relay.path=hf://{address}"]
        message = failing(sampling, *paths, "seeds=0")
        assert message.startswith(f"relay.stages.relay: hf://{address}: the ")
        assert reason in message


def test_answers_that_are_errors(published, hub, monkeypatch):  # noqa: ARG001
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits before it tries again
    hub.failing = "resolve"
    message = failing(rd.load_stage, "hf://user/tiny/base")
    assert message.startswith("hf://user/tiny/base: base/stage.json is not in the cache: the Hub answers 403 (")
    assert message.endswith("; log in with `hf auth login` or set HF_TOKEN with a token that may do this")
