"""Check commands, files, links and options in README.md and docs/."""

import importlib.util
import re
import runpy
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

import relay_diffusion
from relay_diffusion.cli.arguments import parse_arguments
from relay_diffusion.config import compose as compose_command
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.config.train import validate_training
from relay_diffusion.sampling.run import sample
from relay_diffusion.training.run import train
from support import PROJECT, TINY

PAGES = [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md"), *(PROJECT / "demo").rglob("*.md")]
TINY_TRAINING = [override for override in TINY if not override.startswith("network.num_classes")]
TINY_TRAINING += ["resolution=16", "trainer.max_images=8", "network.attention_resolutions=[]"]
FEW = ["picture=2", "batch_size=2"]


def page_id(page):
    return page.relative_to(PROJECT).as_posix()


def test_the_configuration_is_listed():
    spec = importlib.util.spec_from_file_location("configuration", PROJECT / "scripts/document_configuration.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert (PROJECT / "docs/configuration.md").read_text() == generator.document(), (
        "run python scripts/document_configuration.py"
    )
    files = (PROJECT / "conf").rglob("*.yaml")
    groups = {path.relative_to(PROJECT / "conf").parent.as_posix().removesuffix("/parts") for path in files}
    assert groups == {".", *generator.GROUPS}


def test_there_is_one_version():
    assert f"\nversion: {relay_diffusion.__version__}\n" in (PROJECT / "CITATION.cff").read_text()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_are_valid(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    named = re.findall(
        r"(?<![\w/.=-])(?:docs|tests|benchmarks|demo|conf|src)/[\w/.-]+\.(?:md|py|yaml|png|webp|csv|zip)", text
    )
    made = set(re.findall(r"<!-- file: (\S+) -->", text))
    missing += [name for name in named if not (PROJECT / name).exists() and name not in made]
    assert not missing


def test_the_architecture_names_every_module():
    code_map = (PROJECT / "docs/architecture.md").read_text()
    package = PROJECT / "src/relay_diffusion"
    parts = [path.name for path in package.glob("[a-z]*.py")]
    parts += [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    missing = [part for part in parts if not re.search(rf"(?<![\w/]){re.escape(part)}", code_map)]
    assert not missing


def blocks(page):
    """Return (kind, argument, text) of every marked block."""
    marked = re.finditer(
        r"<!-- (file|run|python): (\S+) -->\n\n?(?:```\w+\n(.*?)```|((?:(?:    [^\n]*)?\n)+))", page.read_text(), re.S
    )
    return [(match[1], match[2], match[3] or match[4]) for match in marked]


def commands(text):
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


MARKED = [page for page in PAGES if blocks(page)]
SMALL = {  # what a mark adds to commands, so that they take seconds
    "small": {"train.py": TINY_TRAINING, "sample.py": FEW},
    "draw": {
        "sample.py": [
            *FEW, "seeds=0", "relay.stages.base.changes.sampler.steps=2", "relay.stages.relay.changes.sampler.steps=4",
        ]
    },
    "own": {"train.py": TINY_TRAINING, "sample.py": [*FEW, "seeds=0-3", "picture=0"]},
    "tool": {},
}  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Create a folder with the files that commands need."""
    shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    for name in ("demo", "benchmarks", "docs"):
        (tmp_path / name).symlink_to(PROJECT / name)
    package = tmp_path / "src/relay_diffusion"
    for part in ("diffusion", "samplers"):
        (package / part).mkdir(parents=True)
        module = getattr(relay_diffusion, part)
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(package / part)])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(project, words, more):
    """Run a command of the documentation in this process."""
    if "source=FOLDER" in words:
        for number, kind in enumerate(["cat", "dog", "cat", "dog"]):
            (project / "FOLDER" / kind).mkdir(parents=True, exist_ok=True)
            Image.effect_noise((300, 260), 40 + 40 * number).convert("RGB").save(
                project / f"FOLDER/{kind}/{number}.png"
            )
    more = [*more, "resolution=64"] if "experiment=own_256" in words else more
    assert words[0] == "python", words
    script, arguments = words[1], [*words[2:], *more]
    if script in ("train.py", "sample.py"):
        with initialize_config_dir(str(project / "conf"), version_base="1.3"):
            cfg = compose(Path(script).stem, overrides=arguments)
        if script == "train.py":
            validate_training(cfg)
            train(cfg)
        else:
            validate_sampling(cfg)
            sample(cfg)
        return
    assert not run_main(script, arguments)


def run_main(script, arguments):
    """Run a script, or a module with script="-m", in this process; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments if script == "-m" else [script, *arguments])
        start = partial(runpy.run_module, alter_sys=True) if script == "-m" else runpy.run_path
        patch.delitem(sys.modules, sys.argv[0], raising=False)
        with pytest.raises(SystemExit) as ended:
            start(sys.argv[0], run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("page", MARKED, ids=page_id)
def test_commands_run(page, project):
    for kind, argument, text in blocks(page):
        if kind == "file":
            path = project / argument
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            continue
        if kind == "python":
            exec(compile(text, page.name, "exec"), {})
            continue
        assert commands(text), f"{page}: a mark with nothing to run"
        for words in commands(text):
            call(project, words, SMALL[argument].get(words[1], []))


COMMAND = re.compile(
    r"(?:python|torchrun [^`]*?) (train\.py|sample\.py|(?:benchmarks|scripts)/\w+\.py|-m relay_diffusion\.cli\.[a-z_]+)"
    r"((?:'[^'`\n]*'|[^`\n)])*)"  # arguments in quotes may have brackets
)
OTHER_OPTIONS = ("CHANGELOG.md", "extending.md")  # earlier ones; those that it adds itself
CURRENT = [page for page in PAGES if page.name not in OTHER_OPTIONS]
FLAGS = {"--help", "-sc", "--version", "--cfg"}  # commands that print something instead of running


def documented_commands(page):
    """Return (script, arguments) of every command of a page, with its shell variables replaced."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    variables = {name: value.strip('"') for name, value in re.findall(r'^ +([A-Z]+)=("[^"]*"|\S+)', text, re.M)}
    for script, rest in COMMAND.findall(text):
        words = shlex.split(re.sub(r"\$([A-Z]+)", lambda match: variables[match[1]], rest), comments=True)
        if not FLAGS & {*words}:
            yield script, words


def first_job(words):
    """Return the overrides of the first job of a sweep."""
    if "--multirun" not in words:
        return words
    parsed = OverridesParser.create().parse_overrides([word for word in words if word != "--multirun"])
    return [f"{one.key_or_group}={first_value(one)}" if one.is_sweep_override() else one.input_line for one in parsed]


def first_value(override):
    """Return the first value of a sweep, or the lower end of an interval."""
    return next(override.sweep_string_iterator()) if override.is_discrete_sweep() else override.value().start


def chooses(word):
    """Whether an override chooses a file of conf/, or adds or removes something."""
    group = word.partition("=")[0].partition("@")[0]
    return word[0] in "+~" or group.startswith("hydra") or (PROJECT / "conf" / group).is_dir()


def test_commands_of_train_and_sample_have_known_options(monkeypatch):
    """They are composed, those with the same choices together."""
    monkeypatch.chdir(PROJECT)
    together = {}
    for page in CURRENT:
        for script, words in documented_commands(page):
            if script in ("train.py", "sample.py"):
                words = [word.replace("relay=NAME", "relay=emoji") for word in first_job(words)]
                values = together.setdefault((script, *sorted(filter(chooses, words))), {})
                values.update((word, None) for word in words if not chooses(word))
    for (script, *choices), values in together.items():
        compose_command(Path(script).stem, [*choices, *values])


@pytest.mark.parametrize("page", CURRENT, ids=page_id)
def test_commands_of_tools_have_known_options(page, monkeypatch):
    """Arguments of tools are parsed."""
    monkeypatch.chdir(PROJECT)
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    monkeypatch.setattr(
        "relay_diffusion.cli.arguments.run_tool", lambda given, _, schema, __: parse_arguments(schema, given) and None
    )
    for script, words in documented_commands(page):
        if words and script not in ("train.py", "sample.py"):
            first, *others = script.split()
            assert not run_main(first, [*others, *words])


def test_named_options_exist():
    """Keys in the text, such as `relay.tile`, are those of docs/configuration.md."""
    known = re.findall(r"^\| `([^`]+)` \|", (PROJECT / "docs/configuration.md").read_text(), re.M)
    groups = {*known, *(key[: dot.start()] for key in known for dot in re.finditer(r"\.", key))}
    for page in CURRENT:
        named = re.findall(
            r"`((?:callbacks|data\.dataset|network|relay(?!\.stages)|trainer)(?:\.\w+)+)(?:=[^`]*)?`", page.read_text()
        )
        unknown = {key for key in named if not key.endswith((".png", ".json"))} - groups
        assert not unknown, page
