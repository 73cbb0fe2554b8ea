"""Garbage collection is off while libraries are imported."""

import gc
import subprocess
import sys

import pytest

from relay_diffusion.utils.garbage import without_garbage_collection


@pytest.fixture
def before_imports(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")


@pytest.mark.usefixtures("before_imports")
def test_objects_of_imports_are_never_searched_for_garbage():
    frozen = gc.get_freeze_count()
    with without_garbage_collection():
        assert not gc.isenabled()
        imported = [[] for _ in range(100)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(imported)


@pytest.mark.usefixtures("before_imports")
def test_collection_is_on_after_an_error():
    with pytest.raises(KeyError), without_garbage_collection():
        raise KeyError
    assert gc.isenabled()


@pytest.mark.usefixtures("before_imports")
def test_collection_stays_off_if_it_was_off():
    gc.disable()
    try:
        with without_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_later_job_collects_its_garbage():
    with without_garbage_collection():
        assert gc.isenabled()


@pytest.mark.parametrize(("name", "check"), [("sample", "validate_sampling"), ("train", "validate_training")])
def test_commands_import_without_collection(name, check):
    program = (
        "import gc, sys, relay_diffusion.cli.main as main;"
        f"main.{check} = lambda cfg: sys.exit(0 if gc.isenabled() else 3);"
        f"sys.argv = ['{name}.py', 'run_id=1']; main.{name}()"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 3
