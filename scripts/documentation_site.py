"""Hooks of the documentation site: pages from outside docs/, links to files, output of --help.

`make docs` builds the site; mkdocs.yml names this file twice, as a hook of MkDocs and for PlainDocstrings. README.md,
the model cards, the notebooks and every linked file of the repository become pages, so that no link needs a repository
URL. Nothing is imported from the package: signatures, docstrings and usage texts are read from the source.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

PROJECT = Path(__file__).resolve().parents[1]
DOCS = PROJECT / "docs"
PACKAGE = PROJECT / "src/relay_diffusion"
# Suffixes of text files that a page shows, and their languages.
TEXT = {".cff": "yaml", ".json": "json", ".py": "python", ".txt": "text", ".yaml": "yaml", "": "text"}
CODE = re.compile(r"(^(?P<fence>`{3,}).*?^(?P=fence)$|`[^`\n]*`)", re.M | re.S)
LINK = re.compile(r"\]\((?!\w+:|[#/])([^)#\s]+)(#[^)\s]*)?\)")
MATH = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$]+)\$", re.S)
HELP = re.compile(r"<!-- help: (\w+) -->")
# Public interfaces that classes of users implement.
INTERFACES = (
    "diffusion.corruption.Corruption",
    "samplers.base.Sampler",
    "metrics.base.ImageMetric",
    "text.base.TextEncoder",
)


def target_of(page: Path, link: str) -> Path:
    """Return the file that a relative link of a page points to."""
    return Path(os.path.normpath(page.parent / link))


def site_path(path: Path) -> str:
    """Return where MkDocs finds a file of the repository: a page (.md), or a file to copy."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(PROJECT).as_posix()
    if path.suffix == ".ipynb":
        return name.removesuffix(".ipynb") + ".md"
    return f"{name}.md" if path.is_dir() or path.suffix in TEXT else name


def source_of(uri: str) -> Path:
    """Return the file of the repository behind a page of the navigation."""
    for path in (DOCS / uri, PROJECT / uri, (PROJECT / uri).with_suffix(".ipynb")):
        if path.is_file():
            return path
    raise FileNotFoundError(f"mkdocs.yml: no file of the repository belongs to {uri} of nav")


def without_code(text: str) -> str:
    """Remove code from Markdown."""
    return CODE.sub("", text)


def links(text: str, page: Path) -> Iterator[Path]:
    """Yield the existing files of the repository outside docs/ that a page links to."""
    for match in LINK.finditer(without_code(text)):
        target = target_of(page, match[1])
        if target.exists() and not target.is_relative_to(DOCS):
            yield target


def relinked(text: str, page: Path) -> str:
    """Rewrite the links of a file of the repository to those of its page on the site.

    Links to missing files stay as they are: MkDocs reports them.
    """
    folder = Path(site_path(page)).parent

    def rewrite(match: re.Match[str]) -> str:
        target = target_of(page, match[1])
        if not target.exists():
            return match[0]
        return f"]({Path(os.path.relpath(site_path(target), folder)).as_posix()}{match[2] or ''})"

    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [LINK.sub(rewrite, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(rewrite, text[end:])])


def fenced(text: str, language: str) -> str:
    """Return a code block with a fence longer than any in the text."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def listing(path: Path) -> str:
    """Return a page that shows a text file, or the files of a folder."""
    name = path.relative_to(PROJECT).as_posix()
    head = f"---\nsearch: {{exclude: true}}\n---\n\n# {name}\n\n"
    if not path.is_dir():
        return head + fenced(path.read_text(), TEXT[path.suffix])
    children = sorted(child for child in path.iterdir() if child.is_file())
    shown = [child for child in children if child.suffix == ".yaml"]
    parts = [f"## {child.name}\n\n{fenced(child.read_text(), TEXT[child.suffix])}" for child in shown]
    return head + "\n".join([*(f"- `{child.name}`" for child in children if child not in shown), "", *parts])


def mathml(match: re.Match[str]) -> str:
    """Replace a formula by MathML, in which nothing looks like Markdown."""
    display = "block" if match["block"] else "inline"
    formula = convert(match["block"] or match["inline"], display=display)
    formula = re.sub(r"[*_\[\]\\`]", lambda character: f"&#{ord(character[0])};", formula)
    return formula if match["block"] else f"<span>{formula}</span>"  # <math> at the start of a line ends the paragraph


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and the images of its outputs by file name."""
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(MATH.sub(mathml, source))
            continue
        parts.append(fenced(source, "python"))
        for output in cell["outputs"]:
            data: dict[str, Any] = output.get("data", {"text/plain": output.get("text", "")})
            kind = next((kind for kind in ("image/png", "image/jpeg") if kind in data), None)
            if kind is None:
                parts.append(fenced("".join(data["text/plain"]), "text"))
                continue
            name = f"{path.stem}-{len(images)}.{kind.removeprefix('image/')}"
            images[name] = base64.b64decode("".join(data[kind]))
            parts.append(f"![output of the cell above]({name})")
    return "\n\n".join(parts), images


def constant(module: Path, name: str) -> Any:
    """Return the literal value of a constant of a module, without importing it."""
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id == name for one in node.targets):
            return ast.literal_eval(node.value)
    raise ValueError(f"{module}: no constant {name}")


def api_index() -> str:
    """Return the page of the names that `import relay_diffusion` offers."""
    rows = [
        f"| [`{name}`][relay_diffusion.{module}.{name}] | [`relay_diffusion.{module}`][relay_diffusion.{module}] |"
        for name, module in constant(PACKAGE / "__init__.py", "_EXPORTS").items()
    ]
    docstring = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text())) or ""
    head, example = docstring.split("\n\n", maxsplit=1)
    own = ", ".join(f"[`{name.rpartition('.')[2]}`][relay_diffusion.{name}]" for name in INTERFACES)
    table = ["| name | defined in |", "| --- | --- |", *rows, ""]
    interfaces = f"Interfaces for classes of your own ([Extending](../extending.md)): {own}."
    return "\n".join(["# Python API", "", head, "", fenced(example, "python"), *table, interfaces, ""])


def api_page(package: str) -> str:
    """Return the page of the public classes and functions of a package, module by module."""
    folder = PACKAGE / package
    if not folder.is_dir():
        name = f"relay_diffusion.{package}"
        return f"# {name}\n\n::: {name}\n    options: {{show_root_heading: false}}"
    modules = [path.relative_to(PACKAGE.parent).with_suffix("") for path in sorted(folder.rglob("*.py"))]
    names = [".".join(path.parts) for path in modules if path.name != "__init__"]
    summary = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    parts = [f"# relay_diffusion.{package}", escaped(summary)]
    parts += [f"::: {name}\n    options: {{heading_level: 2}}" for name in names]
    return "\n\n".join(parts)


def command_help(command: str) -> str:
    """Return what a command prints with --help, of train.py and sample.py without all settings."""
    script = PROJECT / f"{command}.py"
    if not script.is_file():
        return fenced(constant(PACKAGE / f"cli/{command}.py", "USAGE"), "text")
    printed = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    return fenced(printed.partition("All options:")[0], "text")


def escaped(docstring: str) -> str:
    """Escape what is no Markdown in a docstring: shapes, formulas, pointers.

    Text in backticks, tables and indented blocks keep their form.
    """
    lines: list[str] = []
    for line in docstring.splitlines():
        indented = line.startswith("    ")
        if lines and lines[-1].strip() and line.strip() and indented != lines[-1].startswith("    "):
            lines.append("")  # an indented block needs an empty line before and after
        if not indented:
            parts = re.split(r"(`[^`]*`)", line)
            parts[::2] = [re.sub(r"([\\*_\[\]#])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
            line = "".join(parts)
        lines.append(line)
    return "\n".join(lines)


class PlainDocstrings(griffe.Extension):
    """Show docstrings as plain text."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Escape the docstring of an object."""
        if obj.docstring:
            obj.docstring.value = escaped(obj.docstring.value)


def navigation(nav: Any) -> Iterator[str]:
    """Yield the pages of mkdocs.yml in order."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from navigation(entry)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Use GitHub's anchors of headings."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the navigation that are not in docs/, and every file that a page links to."""

    def add(uri: str, **content: Any) -> None:
        level = InclusionLevel.INCLUDED if uri in named else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, uri, inclusion=level, **content))

    named = list(navigation(config.nav))
    for uri in named:
        if uri.startswith("api/"):
            package = Path(uri).stem
            add(uri, content=api_index() if package == "index" else api_page(package))
    pending = [source_of(uri) for uri in named if not uri.startswith("api/")]
    seen = {*pending}
    while pending:
        path = pending.pop()
        text = ""
        if path.suffix == ".ipynb":
            text, images = notebook(path)
            for name, image in images.items():
                add(f"{Path(site_path(path)).parent.as_posix()}/{name}", content=image)
        elif path.suffix == ".md":
            text = path.read_text()
        elif path.is_dir() or path.suffix in TEXT:
            text = listing(path)
        else:
            add(site_path(path), abs_src_path=str(path))
        found = {*links(text, path)} - seen if path.suffix in (".md", ".ipynb") else set()
        pending += sorted(found)
        seen |= found
        if text and not path.is_relative_to(DOCS):
            add(site_path(path), content=relinked(text, path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Rewrite the links of a page of docs/, and insert the help of commands."""
    if page.file.generated_by is not None:
        return markdown
    text = relinked(markdown, DOCS / page.file.src_uri)
    return HELP.sub(lambda match: command_help(match[1]), text)
