"""Install the package from a wheel in another folder."""

import subprocess
import sys
import sysconfig
import venv

import pytest

from support import PROJECT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install the wheel in an environment with the dependencies of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(PROJECT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("relay_diffusion-*.whl")
    venv.create(folder / "env", with_pip=False)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    python = folder / "env/bin/python"
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return site


def command(installed, name, *arguments):
    """Run a script of the installed package in another folder."""
    folder = installed.parents[3]
    program = [folder / "env/bin" / name, *arguments]
    result = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_is_complete(installed):
    files = {path.relative_to(PROJECT / "conf") for path in (PROJECT / "conf").rglob("*.yaml")}
    assert {
        path.relative_to(installed / "relay_diffusion/conf")
        for path in (installed / "relay_diffusion/conf").rglob("*.yaml")
    } == files
    assert (installed / "relay_diffusion/py.typed").exists()
    assert (installed / "hydra_plugins/relay_optuna.py").exists()


def test_installed_commands_explain_themselves(installed):
    assert "Common overrides" in command(installed, "relay-train", "--help")


def test_an_installed_package_samples(installed):
    weights = f"relay.stages.base.path={PROJECT / 'demo/emoji_text_64'}"
    few = ["~relay.stages.relay", "relay.stages.base.changes.sampler.steps=2", "seeds=0"]
    command(installed, "relay-sample", "relay=emoji", weights, *few, "output=drawn")
    assert [path.name for path in (installed.parents[3] / "drawn/images").rglob("*.png")] == ["seed00000000.png"]
