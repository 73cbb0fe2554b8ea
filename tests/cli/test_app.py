"""Errors of the command of the app, before it serves anything."""

import socket

import pytest

from relay_diffusion.cli import app
from relay_diffusion.cli.app import AppOptions, serve
from relay_diffusion.cli.arguments import run_tool


def error_of(capsys, *arguments):
    assert run_tool(arguments, app.USAGE, AppOptions, serve) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def test_the_library_is_named(capsys, monkeypatch):
    monkeypatch.setattr("relay_diffusion.utils.installed.find_spec", lambda _: None)
    assert "pip install -e '.[app]'" in error_of(capsys, "relay=emoji")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "missing: relay=..."),
        (("relay=emoji", "prot=1"), "unknown key 'prot'; did you mean port?"),
        (("relay=emoji", "port=high"), "port=high"),
        (("relay=emoji", "device=tpu"), "device=tpu: use auto, cpu, cuda"),
        (("relay=emoji", "max_images=0"), "max_images=0: must be at least 1"),
        (("relay=emoji", "port=99999"), "port=99999: must lie between 0 and 65535"),
        (("relay=emoji", "host=no.such.host.invalid"), "host=no.such.host.invalid port=7860: cannot be used ("),
        (("relay=emojii", "port=0"), "error: relay=emojii: must be a choice of conf/relay that needs no paths, "),
        (("relay=emojii", "port=0"), "; did you mean emoji?\n"),
        (("relay=one_stage", "port=0"), "error: relay=one_stage: must be a choice of conf/relay that needs no paths, "),
        (("relay=one_stage", "port=0"), "; available: celebahq_256, emoji, "),
        (("relay=tests", "port=0"), "error: relay=tests: must be a choice of conf/relay that needs no paths, "),
        (("relay=emoji", "enlarge=fotos", "port=0"), "error: enlarge=fotos: must be a choice of conf/relay that "),
    ],
)
def test_wrong_options(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("relay_diffusion.utils.installed.find_spec", lambda _: object())
    assert message in error_of(capsys, *(arguments or ["port=1"]))


def test_a_port_in_use(capsys, monkeypatch):
    monkeypatch.setattr("relay_diffusion.utils.installed.find_spec", lambda _: object())
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port={port}: cannot be used (" in error_of(capsys, "relay=emoji", f"port={port}")


def test_usage(capsys):
    assert run_tool([], app.USAGE, AppOptions, serve) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in AppOptions.__dataclass_fields__)
