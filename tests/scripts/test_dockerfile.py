"""The Dockerfile, without building it: copied files, versions, users and commands."""

import re
import shlex
import tomllib
from fnmatch import fnmatch

from support import PROJECT


def instructions():
    """Return (keyword, arguments) of each instruction."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", (PROJECT / "Dockerfile").read_text(), flags=re.M))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]


def arguments(keyword):
    return [rest for name, rest in instructions() if name == keyword]


def test_copied_files_exist_and_nothing_else_is_sent():
    copied = {word for rest in arguments("COPY") for word in rest.split()[:-1] if not word.startswith("--")}
    ignored = [line for line in (PROJECT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert not [name for name in copied if not (PROJECT / name).exists()]
    build = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    targets = build["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {build["project"]["readme"], *build["project"]["license-files"], *targets["force-include"]}
    needed |= {package.partition("/")[0] for package in targets["packages"]}
    assert needed <= copied
    assert not [name for name in needed if any(fnmatch(name, line) for line in ignored[1:] if line[0] != "!")]


def test_the_packages_are_those_of_the_makefile():
    installed = [word for rest in arguments("RUN") for word in shlex.split(rest) if "==" in word]
    pinned = re.findall(r"\S+==[\d.]+", (PROJECT / "Makefile").read_text())
    assert installed == pinned
    assert installed[0].startswith("torch==")
    (extras,) = [word for rest in arguments("RUN") for word in shlex.split(rest) if word.startswith("/src[")]
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert {*extras[5:-1].split(",")} <= {*project["optional-dependencies"]}
    assert shlex.split(arguments("CMD")[0].strip("[]").replace(",", ""))[0] in project["scripts"]


def test_the_base_image_has_a_version_and_commands_run_without_privileges():
    (base,) = arguments("FROM")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    assert arguments("USER")[-1] != "root"
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(place for place, name in enumerate(names) if name in ("RUN", "COPY"))
