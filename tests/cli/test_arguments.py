"""Errors of the commands with key=value arguments."""

from dataclasses import dataclass

import pytest
from hydra.utils import instantiate

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.errors import UserError


@dataclass
class Options:
    """Options of a command."""

    name: str = ""


def refuse():
    raise UserError("name: is taken; use another one")


def test_user_errors_inside_hydra_are_one_line(capsys):
    code = run_tool(["name=a"], "", Options, lambda _: instantiate({"_target_": f"{__name__}.refuse"}))
    assert (code, capsys.readouterr().err) == (2, "error: name: is taken; use another one\n")


def test_bugs_have_a_traceback():
    def divide(_):
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        run_tool(["name=a"], "", Options, divide)
