"""The package as others install it: from a wheel, outside of this folder."""

import os
import subprocess
import sys
import zipfile

import pytest

from support import PROJECT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(PROJECT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("relay_diffusion-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def command(installed, name, *arguments):
    """Run what the script of an installed package runs, in another folder."""
    code = f"import relay_diffusion.commands as c; print(c.__file__); c.{name}()"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=installed.parent, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.startswith(str(installed)), result.stderr
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_holds_all_it_needs(installed):
    files = {path.relative_to(PROJECT / "conf") for path in (PROJECT / "conf").rglob("*.yaml")}
    assert {
        path.relative_to(installed / "relay_diffusion/conf")
        for path in (installed / "relay_diffusion/conf").rglob("*.yaml")
    } == files
    assert (installed / "relay_diffusion/py.typed").exists()
    (info,) = installed.glob("*.dist-info")
    scripts = (info / "entry_points.txt").read_text()
    assert "relay-train = relay_diffusion.commands:train" in scripts
    assert "relay-sample = relay_diffusion.commands:sample" in scripts


def test_installed_commands_explain_themselves(installed):
    assert "Overrides people use" in command(installed, "train", "--help")
    assert "Overrides people use" in command(installed, "sample")


def test_an_installed_package_samples(installed):
    weights = [
        f"relay.stages.{stage}.path={PROJECT / 'demo' / name}"
        for stage, name in (("base", "emoji_64"), ("relay", "emoji_256"))
    ]
    few = ["relay.stages.base.changes.sampler.steps=2", "relay.stages.relay.changes.sampler.steps=4", "seeds=0"]
    command(installed, "sample", "relay=emoji", *weights, *few, "output=drawn")
    assert [path.name for path in (installed.parent / "drawn/images").rglob("*.png")] == ["seed00000000.png"]
