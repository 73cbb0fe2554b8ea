"""Navigation of the documentation site, and the pages and links that its hook makes. No site is built."""

import json
import re
import tomllib

import pytest
import yaml
from markdown import markdown

import documentation_site as site
from support import PROJECT

PAGES = list(site.navigation(yaml.safe_load((PROJECT / "mkdocs.yml").read_text())["nav"]))
INTERNAL = {"app", "cli", "kernels", "utils"}


def test_every_page_is_in_the_navigation_once():
    assert len(PAGES) == len({*PAGES})
    documents = {path.relative_to(site.DOCS).as_posix() for path in site.DOCS.rglob("*.md")}
    assert documents <= {*PAGES}
    others = {site.site_path(path) for folder in ("demo", "notebooks") for path in (PROJECT / folder).rglob("*.md")}
    others |= {site.site_path(path) for path in (*PROJECT.glob("*.md"), *PROJECT.glob("notebooks/*.ipynb"))}
    assert {page for page in PAGES if not page.startswith("api/")} - documents == others


def test_every_entry_of_the_navigation_exists():
    for page in PAGES:
        if page.startswith("api/"):
            package = page.removeprefix("api/").removesuffix(".md")
            assert package == "index" or list(site.PACKAGE.glob(f"{package}*"))
        else:
            assert site.source_of(page).is_file()


def test_every_public_package_has_a_page():
    packages = {path.parent.name for path in site.PACKAGE.glob("*/__init__.py")} - INTERNAL
    assert {f"api/{name}.md" for name in {*packages, "index", "errors"}} == {
        page for page in PAGES if page.startswith("api/")
    }


def test_every_command_shows_its_help():
    scripts = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]
    page = (site.DOCS / "command-line.md").read_text()
    targets = {target.removeprefix("relay_diffusion.cli.") for target in scripts.values()}
    commands = {target.removeprefix("main:").removesuffix(":main") for target in targets}
    assert {*site.HELP.findall(page)} == commands
    assert all(f"`{name}`" in page for name in scripts)
    assert "  destination  the zip to write" in site.command_help("convert_images")


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("docs/app.md", "robustness.md#images", "robustness.md#images"),
        ("docs/app.md", "app.webp", "app.webp"),
        ("docs/app.md", "../demo/prompts.txt", "demo/prompts.txt.md"),
        ("docs/app.md", "../demo/photos.csv", "demo/photos.csv"),
        ("docs/app.md", "../conf/sampler", "conf/sampler.md"),
        ("docs/app.md", "../README.md#results", "README.md#results"),
        ("docs/app.md", "../notebooks/method.ipynb", "notebooks/method.md"),
        ("README.md", "docs/app.md", "app.md"),
        ("README.md", "LICENSE", "LICENSE.md"),
        ("demo/photos_256/MODEL_CARD.md", "../NOTICE.md#photographs", "../NOTICE.md#photographs"),
        ("demo/photos_256/MODEL_CARD.md", "../../docs/photos.md", "../../photos.md"),
        ("notebooks/method.ipynb", "quick_tour.ipynb", "quick_tour.md"),
        ("docs/app.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("docs/app.md", "#options", "#options"),
        ("docs/app.md", "missing.md", "missing.md"),
    ],
)
def test_links_lead_to_pages_of_the_site(page, link, expected):
    assert site.relinked(f"a [link]({link}) b", PROJECT / page) == f"a [link]({expected}) b"


def test_links_in_code_stay():
    text = "[a](../README.md) `[a](../README.md)`\n\n```python\nx[0](../README.md)\n```\n\n[b](../CHANGELOG.md)"
    expected = "[a](README.md) `[a](../README.md)`\n\n```python\nx[0](../README.md)\n```\n\n[b](CHANGELOG.md)"
    assert site.relinked(text, site.DOCS / "app.md") == expected
    assert list(site.links(text, site.DOCS / "app.md")) == [PROJECT / "README.md", PROJECT / "CHANGELOG.md"]


def test_docstrings_are_plain_text():
    docstring = "x * y [B](C) <tag> `a_b[0]`.\nSo:\n    x' = a * b\nEnd_.\n"
    expected = "x \\* y \\[B\\](C) &lt;tag> `a_b[0]`.\nSo:\n\n    x' = a * b\n\nEnd\\_."
    assert site.escaped(docstring) == expected


def test_a_fence_is_longer_than_those_inside():
    assert site.fenced("a\n```\nb", "text") == "````text\na\n```\nb\n````\n"


def test_a_notebook_becomes_a_page(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "The width\n", "$s_0$ is *a* number."]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [{"output_type": "stream", "text": ["1\n"]}]},
        {
            "cell_type": "code",
            "source": ["show()"],
            "outputs": [{"data": {"image/png": "aGk=", "text/plain": "Figure"}}],
        },
    ]
    path = tmp_path / "toy.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    text, images = site.notebook(path)
    assert images == {"toy-0.png": b"hi"}
    title, *others = text.split("\n\n")
    assert "_" not in title
    assert re.sub("<math.*</math>", "MATH", markdown(title)) == (
        "<h1>Title</h1>\n<p>The width\n<span>MATH</span> is <em>a</em> number.</p>"
    )
    assert "\n\n".join(others) == (
        "```python\nprint(1)\n```\n\n\n```text\n1\n```\n\n\n```python\nshow()\n```\n\n\n"
        "![output of the cell above](toy-0.png)"
    )
