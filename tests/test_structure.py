"""Order of imports, imports without torch, module state, and docstrings."""

import ast
import re
import subprocess
import sys

import pytest

from support import PROJECT, run

PACKAGE = PROJECT / "src" / "relay_diffusion"
PURE = ("diffusion", "kernels", "networks", "samplers")
ORDER = (  # a package imports only those before it
    "errors", "utils", "kernels", "diffusion", "networks", "samplers", "text", "models", "data", "checkpoints",
    "metrics", "training", "sampling", "analysis", "app", "config", "cli",
)  # fmt: skip


def imports(path):
    """Modules imported anywhere in a file, and for `from package import name` also package.name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_imports(package, order):
    """(importing file, imported module) of every import against the order, those inside functions too."""
    for path in sorted(package.rglob("*.py")):
        own, *_ = path.relative_to(package).with_suffix("").parts
        if own == "__init__":
            continue
        for module in imports(path):
            root, _, name = module.partition(".")
            target = name.split(".")[0]
            if root == package.name and target in order and order.index(target) > order.index(own):
                yield path.relative_to(package).as_posix(), module


def test_packages_import_only_packages_before_them():
    assert list(wrong_imports(PACKAGE, ORDER)) == []


@pytest.mark.parametrize(
    "line",
    ["from toy.high import x", "import toy.high.x", "def f():\n    from toy import high", "import toy.high as h"],
)
def test_an_import_against_the_order_is_found(tmp_path, line):
    for name in ("low", "high"):
        (tmp_path / "toy" / name).mkdir(parents=True)
        (tmp_path / f"toy/{name}/x.py").write_text(line if name == "low" else "from toy.low import x")
    assert {path for path, _ in wrong_imports(tmp_path / "toy", ("low", "high"))} == {"low/x.py"}


def test_the_root_of_the_package_holds_packages():
    names = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert {name for name in names if (PACKAGE / name).is_file()} == {"__init__.py", "errors.py", "py.typed"}
    assert {name for name in names if (PACKAGE / name).is_dir()} <= {*ORDER, "conf"}


@pytest.mark.parametrize("package", PURE)
def test_the_mathematics_imports_no_framework(package):
    for path in (PACKAGE / package).rglob("*.py"):
        for module in imports(path):
            assert not module.startswith(("lightning", "hydra", "omegaconf", "torchmetrics")), f"{path}: {module}"


def test_the_mathematics_loads_no_framework():
    program = (
        "import sys, relay_diffusion.samplers, relay_diffusion.networks;"
        "print([m for m in ('lightning', 'hydra', 'omegaconf', 'torchmetrics') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def circle(package):
    """Modules of a package that import each other in a circle; none if there is no circle."""
    files = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
    }
    edges = {name: {m for m in imports(path) if m in files and m != name} for name, path in files.items()}

    def visit(name, trail):
        if name in trail:
            return [*trail[trail.index(name) :], name]
        found = next(filter(None, (visit(target, [*trail, name]) for target in edges[name] if target not in done)), [])
        done.add(name)
        return found

    done: set[str] = set()
    return next(filter(None, (visit(name, []) for name in files)), [])


def test_no_import_circle():
    assert circle(PACKAGE) == []


@pytest.mark.parametrize("line", ["import toy.{}", "from toy import {}", "from toy.{} import name"])
def test_an_import_circle_is_found(tmp_path, line):
    (tmp_path / "toy").mkdir()
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"toy/{name}.py").write_text(line.format(other))
    assert set(circle(tmp_path / "toy")) == {"toy.a", "toy.b", "toy.c"}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("train.py", "--help"), ("sample.py", "--help")])
def test_help_names_the_groups_without_loading_torch(arguments):
    result = run(*arguments, PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "import time:" in line}
    assert "hydra" in loaded
    assert not loaded & {"torch", "lightning", "torchmetrics", "wandb", "huggingface_hub"}
    assert "strategy: ddp, ddp_cpu, single" in result.stdout


def test_entry_points_import_no_torch():
    program = (
        "import sys, relay_diffusion, relay_diffusion.cli.main, relay_diffusion.config.run_dir;"
        "import relay_diffusion.utils.distributed, relay_diffusion.utils.host;"
        "print('torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"


CHECKS = """
import sys
from relay_diffusion.config import compose
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.config.train import validate_training
from relay_diffusion.errors import UserError
for command, *options in {checks}:
    try:
        (validate_training if command == "train" else validate_sampling)(compose(command, options))
    except UserError as error:
        print(error, [name for name in ("torch", "lightning") if name in sys.modules])
"""


def test_invalid_options_are_reported_before_slow_imports():
    """Importing Lightning takes seconds, torch one."""
    checks = [
        ("sample", "mode=foo"),
        ("sample", "seeds=5-1"),
        ("sample", "relay.stages.base.path=nowhere"),
        ("sample", "reference=nowhere", "mode=evaluate"),
        ("train", "data.dataset.path=nowhere"),
        ("train", "resume=nowhere"),
        ("train", "network.resolution=3"),
        ("train", "network.channels=-1", "data.dataset.path=conf"),  # needs torch: the last
    ]
    program = CHECKS.format(checks=checks)
    result = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == len(checks)
    for (_, option, *_), line in zip(checks, lines, strict=True):
        assert option.partition("=")[0] in line
        assert line.endswith("['torch']" if option == "network.channels=-1" else "[]"), line


def test_tests_named_in_robustness_exist():
    """docs/robustness.md names a test for each of its rows."""
    named = set(re.findall(r"\btest_[a-z0-9_]+\b", (PROJECT / "docs/robustness.md").read_text()))
    tests = list((PROJECT / "tests").rglob("test_*.py"))
    known = {path.stem for path in tests} | {
        name for path in tests for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 40
    assert named <= known, named - known


CHANGES = {"add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}
MUTABLE = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
CONTAINERS = {"dict", "list", "set", "defaultdict", "deque", "Counter", "OrderedDict"}


def mutable_state(source):
    """Module-level containers that are changed or not in capitals, and names of `global` statements."""
    tree = ast.parse(source)
    tables, found = set(), []
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        called = ast.unparse(node.value.func).rpartition(".")[2] if isinstance(node.value, ast.Call) else ""
        if isinstance(node.value, MUTABLE) or called in CONTAINERS:
            names = {ast.unparse(target) for target in getattr(node, "targets", None) or [node.target]}
            tables |= names
            found += [name for name in names if not name.isupper() and name != "__all__"]
    for node in ast.walk(tree):
        changed = None
        if isinstance(node, ast.Global):
            found += node.names
        elif isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
            changed = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            changed = node.func.value
        elif isinstance(node, ast.AugAssign):
            changed = node.target
        if isinstance(changed, ast.Name) and changed.id in tables:
            found.append(changed.id)
    return found


def test_no_module_holds_state_that_changes():
    found = {path.relative_to(PACKAGE).as_posix(): mutable_state(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "cache = {}", "cache: dict = dict()", "T = {}\ndef f(x):\n    T[x] = 1", "T = {}\ndef f(x):\n    del T[x]",
        "T = []\ndef f(x):\n    T.append(x)", "T = set()\nT |= {1}", "n = 0\ndef f():\n    global n\n    n += 1",
    ],
)  # fmt: skip
def test_state_that_changes_is_found(source):
    assert mutable_state(source)
    assert not mutable_state("T = {1: 2}\nU = (1,)\n__all__ = ['T']\ndef f(x):\n    y = {}\n    y[x] = T[1]")


def first_sentence(docstring):
    """First sentence of a docstring, up to a period or colon, without what is in parentheses.

    A formula, shape or list of options after a colon does not count.
    """
    text = re.sub(r"\([^()]*\)", "", docstring.split("\n\n")[0])
    return re.split(r"[.:](?:\s|$)", text, maxsplit=1)[0]


def long_first_sentences(source, words=12):
    """First sentences of more than `words` words in a module's docstrings."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    sentences = (first_sentence(docstring) for docstring in docstrings if docstring)
    return [sentence for sentence in sentences if len(sentence.split()) > words]


def test_docstrings_begin_with_a_short_sentence():
    found = {str(path): long_first_sentences(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_long_first_sentence_is_found():
    twelve = "one two three four five six seven eight nine ten eleven twelve"
    assert not long_first_sentences(f'"""{twelve}. More words here."""')
    assert not long_first_sentences(f'"""{twelve}: [B] -> [B,1,1,1] on a device."""')
    assert not long_first_sentences(f'"""{twelve} (of Karras et al. 2022, section 5)."""')
    assert long_first_sentences(f'"""{twelve} thirteen."""')
    assert long_first_sentences(f'def f():\n    """{twelve}\n    thirteen."""')
