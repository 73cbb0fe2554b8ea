"""Write docs/configuration.md from the comments in conf/.

It lists key, value and comment of every option. tests/slow/test_documentation.py compares.
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
    "data": "Training images.",
    "network": "UNet of a stage.",
    "stage": "Corruption, loss and sampler of a stage.",
    "stage/corruption": "Corruption of `stage=relay`.",
    "sampler": "Sampler of a stage; each stage has a default.",
    "optimizer": "Optimizer.",
    "text": "Text encoder of captions and prompts (docs/text.md).",
    "augment": "Data augmentation, with augmentation labels as input of the network.",
    "trainer": "Lightning Trainer.",
    "strategy": "Devices and distributed strategy.",
    "callbacks": "Callbacks of training: EMA weights, log, checkpoints, evaluation.",
    "logger": "Loggers of metrics; the CSV is always written.",
    "relay": "Stages of a relay and their checkpoints.",
    "metrics": "Metrics of `mode=evaluate`.",
    "experiment": "Sets of options for `train.py`; see the files for the values.",
    "hydra/launcher": "Launchers of sweeps (`--multirun`).",
    "hydra/sweeper": "Sweepers, which choose the jobs of a sweep.",
}
HIDDEN = re.compile(r"_target_|_partial_|_recursive_|defaults|hydra")
HEAD = """\
# Configuration

Every group and key of `conf/`. `python scripts/document_configuration.py` writes this file from the yaml files.

- `GROUP=CHOICE` chooses a file and `KEY=VALUE` sets a key of `train.py` or `sample.py`. `--cfg job` prints the result.
- `+KEY=VALUE` adds an argument of a class that is not listed.
- `relay.stages.NAME.changes.KEY=VALUE` changes a trained stage in `sample.py`.
- `${...}` is the value of another key.

Training accepts the options of Lightning's Trainer under `trainer` and `strategy`. The last section lists the others.
"""


class Row(NamedTuple):
    """Key, value as written, and comment."""

    key: str
    value: str
    meaning: str


def _comments(lines: list[str]) -> dict[int, str]:
    """Collect the comments behind keys by line number, with continuation lines."""
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
    """List the keys of a yaml file in order."""
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
    """Return the comment at the top of a file."""
    top = []
    for line in text.splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        top.append(line.removeprefix("#").strip())
    return " ".join(top)


def table(found: list[Row]) -> list[str]:
    """Format rows as a Markdown table."""
    cell = lambda text: text.replace("|", "\\|")  # noqa: E731
    lines = [f"| `{row.key}` | `{cell(row.value)}` | {cell(row.meaning)} |" for row in found]
    return ["| key | value | |", "| --- | --- | --- |", *lines, ""] if lines else []


def _defaults(text: str) -> str:
    """Describe the defaults of a file."""
    given = (yaml.safe_load(text) or {}).get("defaults", [])
    others = [f"`{entry.split('@')[0]}`" for entry in given if isinstance(entry, str) and entry != "_self_"]
    return f" Includes {' and '.join(others)}" + (", and:" if rows(text) else ".") if others else ""


def _prefix(group: str, text: str) -> str:
    """Return the prefix of the keys in a file."""
    package = re.search(r"^# @package (\S+)", text)
    where = package[1] if package else group.replace("/", ".")
    return "" if where == "_global_" else f"{where}."


def document() -> str:
    """Return docs/configuration.md."""
    lines = [HEAD]
    for name in ("train", "sample"):
        text = (CONF / f"{name}.yaml").read_text()
        lines += [f"## {name}.py", "", introduction(text), "", *table(rows(text))]
    for group, what in GROUPS.items():
        lines += [f"## {group}", "", what, ""]
        for path in sorted([*(CONF / group).glob("*.yaml"), *(CONF / group).glob("parts/*.yaml")]):
            text, choice = path.read_text(), path.relative_to(CONF / group).with_suffix("").as_posix()
            if group == "experiment":
                lines.append(f"- `{group}={choice}`: {introduction(text)}")
                continue
            heading = f"`{group}={choice}`" if "parts/" not in choice else f"`{choice}`, included in others"
            lines += [f"### {heading}", "", introduction(text) + _defaults(text), ""]
            lines += table(rows(text, _prefix(group, text)))
        lines += [""] if group == "experiment" else []
    lines += ["## Unsupported options of Lightning's Trainer", "", "| option | reason or alternative |"]
    lines += ["| --- | --- |", *(f"| `{option}` | {reason} |" for option, reason in UNSUPPORTED.items())]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (DOCS / "configuration.md").write_text(document())
