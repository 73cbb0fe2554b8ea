"""Importing or calling the package leaves the state of the process as it is."""

import json
import logging
import warnings

import pytest

from relay_diffusion.utils.quiet import quiet_libraries
from support import run

PROGRAM = """
import importlib, json, logging, os, pkgutil, signal, sys, warnings
import hydra, lightning, lightning.pytorch.loggers, matplotlib.pyplot, omegaconf, PIL.Image, torch, torchmetrics, wandb
import diffusers.pipelines.pipeline_utils
import gradio, triton, triton.language  # what other libraries do when they are imported is theirs

def state():
    loggers = [logging.root, *(each for each in logging.root.manager.loggerDict.values() if hasattr(each, "level"))]
    return {
        "warning filters": str(warnings.filters),
        "environment": str(dict(os.environ)),
        "logging levels": {each.name: each.level for each in loggers},
        "signal handlers": str([signal.getsignal(number) for number in sorted(signal.valid_signals())]),
        "resolvers": [name for name in ("new_run_id", "run_dir", "text") if omegaconf.OmegaConf.has_resolver(name)],
        "limit of pixels": PIL.Image.MAX_IMAGE_PIXELS,
        "excepthook": str(sys.excepthook),
        "torch": str([
            torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark, torch.is_grad_enabled(), torch.initial_seed(),
        ]),
    }

torch.manual_seed(0)
before, changes, imported = state(), [], 0
import relay_diffusion
for module in pkgutil.walk_packages(relay_diffusion.__path__, "relay_diffusion."):
    importlib.import_module(module.name)
    now = state()
    now["logging levels"] = {n: level for n, level in now["logging levels"].items() if n in before["logging levels"]}
    changes += [f"{module.name}: {key}" for key in before if now[key] != before[key]]
    before, imported = now, imported + 1
print(json.dumps([imported, changes]))
"""


@pytest.mark.slow
def test_imports_change_nothing_of_the_process(tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("gradio")
    pytest.importorskip("matplotlib")
    pytest.importorskip("triton")
    (tmp_path / "program.py").write_text(PROGRAM)
    result = run(str(tmp_path / "program.py"))
    assert result.returncode == 0, result.stderr
    imported, changes = json.loads(result.stdout.splitlines()[-1])
    assert imported > 90
    assert changes == []


def state():
    return list(warnings.filters), [logging.getLogger(f"lightning.{name}").level for name in ("pytorch", "fabric")]


def test_messages_are_hidden_only_within_the_block():
    before = state()

    @quiet_libraries()
    def broken():
        assert state() != before
        raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert state() == before


def test_training_from_python_leaves_filters_and_levels(fit):
    before = state()
    fit("run", 4)
    assert state() == before
