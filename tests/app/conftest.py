"""Tiny relays 8 -> 16 for the app."""

import json
import os
import re
import signal
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import pytest

from processes import Process, ended, until
from relay_diffusion.checkpoints.loading import load_relay
from text_relays import export_text_relay, export_text_stage
from tiny_encoders import save_encoder

CLASSES = 2


@pytest.fixture(scope="session")
def relay_folder(tmp_path_factory):
    """Exported stages of a relay with two classes, without text."""
    root = tmp_path_factory.mktemp("app")
    export_text_stage(root / "base", 8, None, classes=CLASSES)
    export_text_stage(root / "relay", 16, None, block=2, classes=CLASSES)
    return root


@pytest.fixture(scope="session")
def exported(relay_folder):
    """Paths of these stages by name."""
    return {name: relay_folder / name for name in ("base", "relay")}


@pytest.fixture(scope="session")
def relay(exported):
    """The relay of these stages, which tests leave as it is."""
    relay = load_relay(exported)
    yield relay
    assert relay.observers == relay.tile_observers == []


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """Exported stages of a relay with text, without classes."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("text")
    return export_text_relay(root, save_encoder(root / "bert", "bert"))


@pytest.fixture(scope="session")
def text_relay(text_folder):
    return load_relay({name: text_folder / name for name in ("base", "relay")})


class App(NamedTuple):
    """A running app; folder: where it puts its files."""

    url: str
    folder: Path


def upload(url, name, data):
    """Upload a file; return its path on the server."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    with urlopen(Request(f"{url}gradio_api/upload", head + data + b"\r\n--x--\r\n", kind)) as answer:
        return Path(json.load(answer)[0])


@pytest.fixture(scope="session")
def app(exported, tmp_path_factory):
    """A running app with the tiny relay, which also enlarges under another name; a signal ends it."""
    pytest.importorskip("gradio")
    stages = {name: {"path": str(path)} for name, path in exported.items()}
    root = tmp_path_factory.mktemp("server")
    for name in ("tiny", "other"):
        (root / name).mkdir()
        (root / name / "relay.json").write_text(json.dumps({"format": 1, "stages": stages}))
    command = [
        "-m", "relay_diffusion.cli.app", f"relay={root / 'tiny'}", f"enlarge={root / 'other'}", "port=0", "device=cpu",
        "max_megapixels=1",
    ]  # fmt: skip
    with ended([Process(root / "output.txt", command, GRADIO_ALLOWED_PATHS="/etc")]) as (process,):
        until(lambda: "open http" in process.text(), [process])
        url = re.search(r"open (\S+) ", process.text())[1]
        file = upload(url, "text.txt", b"text")
        folder = next(path for path in file.parents if path.name.startswith("relay-diffusion-app-"))
        yield App(url, folder)
        before = process.text()
        os.kill(process.popen.pid, signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
        assert not folder.exists()
        assert process.text() == before
