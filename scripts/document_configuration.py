"""Writes docs/configuration.md from the yaml files and their comments: `python scripts/document_configuration.py`.

Each key of each group, its value and what the comment beside it says. tests/slow/test_documentation.py compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from relay_diffusion.config import CONF
from relay_diffusion.config.train import UNSUPPORTED

DOCS = Path(__file__).resolve().parents[1] / "docs"
GROUPS = {
    "data": "Images to train on.",
    "network": "The UNet.",
    "stage": "What a stage learns, and how it samples.",
    "sampler": "How a stage samples; each stage has a default.",
    "optimizer": "The optimizer of training.",
    "augment": "Changes of training images that the network is told about.",
    "trainer": "Lightning's Trainer.",
    "strategy": "How devices work together.",
    "callbacks": "What happens beside training.",
    "logger": "Where curves go; a CSV is always written.",
    "relay": "Which stages sample, from which weights.",
    "metrics": "What `mode=evaluate` measures.",
    "experiment": "Sets of choices and values for `train.py`; what they set is in their files.",
    "hydra/launcher": "Where the jobs of a sweep (`--multirun`) run.",
}
HIDDEN = re.compile(r"_target_|_partial_|_recursive_|defaults|hydra")
HEAD = """\
# Configuration

Every group and key, written by `python scripts/document_configuration.py` from the yaml files in `conf/`.
`GROUP=CHOICE` chooses a file, `KEY=VALUE` sets a key, both for `train.py` or `sample.py`; `--cfg job` after them
prints what they make. `${...}` takes the value of another key. What an experiment sets is in its file. `sample.py`
changes trained stages by `relay.stages.NAME.changes.KEY=VALUE`. A key of a class that is not listed is added by
`+KEY=VALUE`. Training takes the options of Lightning's Trainer that are listed under `trainer` and `strategy`; the
last section says why not the others.
"""


class Row(NamedTuple):
    """A key, its value as written, what its comment says."""

    key: str
    value: str
    meaning: str


def _comments(lines: list[str]) -> dict[int, str]:
    """Line number -> the comment behind what is written there, with the lines that continue it."""
    found: dict[int, str] = {}
    last = None
    for number, line in enumerate(lines):
        match = re.match(r"^(.*?)(?:^|\s)#\s?(.*)$", line)
        if match is None:
            last = None
        elif match[1].strip():
            found[number], last = match[2].strip(), number
        elif last is not None and line.startswith(" " * 8):
            found[last] += f" {match[2].strip()}"
    return found


def _leaves(node: yaml.Node, prefix: str) -> Iterator[tuple[str, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode) or not node.value:
        yield prefix.rstrip("."), node
        return
    for key, value in node.value:
        if not HIDDEN.fullmatch(key.value):
            yield from _leaves(value, f"{prefix}{key.value}.")


def rows(text: str, prefix: str = "") -> list[Row]:
    """The keys of a yaml file in order."""
    lines, found = text.splitlines(), []
    comments = _comments(lines)
    root = yaml.compose(text)
    if isinstance(root, yaml.MappingNode):
        for key, node in _leaves(root, prefix):
            value = text[node.start_mark.index : node.end_mark.index].strip()
            meaning = comments.get(node.end_mark.line if "\n" not in value else node.start_mark.line, "")
            found.append(Row(key, " ".join(value.split()), meaning))
    return found


def introduction(text: str) -> str:
    """The comment at the top of a file."""
    top = []
    for line in text.splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        top.append(line.removeprefix("#").strip())
    return " ".join(top)


def table(found: list[Row]) -> list[str]:
    """A Markdown table."""
    cell = lambda text: text.replace("|", "\\|")  # noqa: E731
    lines = [f"| `{row.key}` | `{cell(row.value)}` | {cell(row.meaning)} |" for row in found]
    return ["| key | value | |", "| --- | --- | --- |", *lines, ""] if lines else []


def _defaults(text: str) -> str:
    """What a file takes over from others, in words."""
    given = (yaml.safe_load(text) or {}).get("defaults", [])
    others = [f"`{entry.split('@')[0]}`" for entry in given if isinstance(entry, str) and entry != "_self_"]
    return f" What {' and '.join(others)} has" + (", and:" if rows(text) else ".") if others else ""


def _prefix(group: str, text: str) -> str:
    """What stands before the keys of a file."""
    package = re.search(r"^# @package (\S+)", text)
    where = package[1] if package else group.replace("/", ".")
    return "" if where == "_global_" else f"{where}."


def document() -> str:
    """The whole page."""
    lines = [HEAD]
    for name in ("train", "sample"):
        text = (CONF / f"{name}.yaml").read_text()
        lines += [f"## {name}.py", "", introduction(text), "", *table(rows(text))]
    for group, what in GROUPS.items():
        lines += [f"## {group}", "", what, ""]
        for path in sorted((CONF / group).rglob("*.yaml")):
            text, choice = path.read_text(), path.relative_to(CONF / group).with_suffix("").as_posix()
            if group == "experiment":
                lines.append(f"- `{group}={choice}`: {introduction(text)}")
                continue
            heading = f"`{group}={choice}`" if "parts/" not in choice else f"`{choice}`, which others take over"
            lines += [f"### {heading}", "", introduction(text) + _defaults(text), ""]
            lines += table(rows(text, _prefix(group, text)))
        lines += [""] if group == "experiment" else []
    lines += ["## Options of Lightning's Trainer that training does not take", "", "| option | why, or what to use |"]
    lines += ["| --- | --- |", *(f"| `{option}` | {reason} |" for option, reason in UNSUPPORTED.items())]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (DOCS / "configuration.md").write_text(document())
