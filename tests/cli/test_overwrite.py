"""Tools that write files replace existing ones only with overwrite=true."""

import importlib
import runpy
import sys
from functools import partial

import pytest

from support import PROJECT

PACKAGE = PROJECT / "src"
TOOLS = {  # module: (arguments, a file that it would replace)
    "relay_diffusion.cli.convert_images": (
        ["source=demo/emoji-64.zip", "classes=keep", "destination={}/out.zip"],
        "out.zip",
    ),
    "scripts/make_emoji.py": (["images=x.tgz", "groups=y.tgz", "destination={}/out.zip"], "out.zip"),
    "relay_diffusion.cli.convert_checkpoint": (["source=demo/emoji_text_64", "destination={}"], "stage.json"),
    "relay_diffusion.cli.publish": (["source=demo/emoji", "destination={}"], "relay.json"),
    "relay_diffusion.cli.neighbours": (["images=a", "reference=b", "destination={}"], "neighbours.csv"),
    "relay_diffusion.cli.spectrum": (["images=demo/emoji-64.zip", "output={}"], "snr.csv"),
    "benchmarks/bicubic.py": (["source=demo/emoji-64.zip", "destination={}/out.zip"], "out.zip"),
}


WITHOUT_FILES = {"relay_diffusion.cli.app"}  # its files are in a temporary folder


def test_every_tool_of_the_package_is_here():
    commands = [path for path in PACKAGE.rglob("*.py") if "run_tool(sys.argv" in path.read_text()]
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in commands}
    assert modules - WITHOUT_FILES == {name for name in TOOLS if not name.endswith(".py")}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_refuses_to_replace_a_file(tool, tmp_path, monkeypatch, capsys):
    arguments, existing = TOOLS[tool]
    (tmp_path / existing).write_text("precious")
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(sys, "argv", [tool, *(argument.format(tmp_path) for argument in arguments)])
    start = runpy.run_path if tool.endswith(".py") else partial(runpy.run_module, alter_sys=True)
    monkeypatch.delitem(sys.modules, tool, raising=False)  # runpy would warn; restored for other tests
    with pytest.raises(SystemExit) as ended:
        start(tool, run_name="__main__")
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert (
        f"{tmp_path / existing}: exists already; choose another name, or overwrite=true to replace it\n" in output.err
    )
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert (tmp_path / existing).read_text() == "precious"


@pytest.mark.parametrize("tool", [name for name in TOOLS if not name.endswith(".py")])
def test_the_help_of_a_tool_names_the_option(tool):
    assert "\n  overwrite " in importlib.import_module(tool).USAGE
