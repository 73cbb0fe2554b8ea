"""Training and sampling from Python, without a command line."""

import subprocess
import sys

import pytest

from support import PROJECT, TINY

PROGRAM = """
import sys
from relay_diffusion.config import compose
from relay_diffusion.sampling.run import sample
from relay_diffusion.training.run import train
root, *options = sys.argv[1:]
stage = train(compose("train", [*options, f"run_dir={root}/run"]))
assert stage.images_seen == 8
relay = ["relay=one_stage", f"relay.stages.base.path={root}/run", "trainer.accelerator=cpu", "seeds=0-1"]
results = sample(compose("sample", [*relay, f"output={root}/samples"]))
assert results["sampled_now"] == 2
"""


@pytest.mark.slow
def test_compose_and_train_suffice(small_zip, tmp_path):
    """A fresh interpreter: nothing else has registered resolvers."""
    options = [*TINY, "resolution=16", f"data.dataset.path={small_zip}", "trainer.max_images=8"]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *options]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
