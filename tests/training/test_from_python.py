"""Training and sampling from Python, without a command line, and the libraries that they load."""

import json

import pytest

from support import TINY, start
from text_relays import export_text_stage

PROGRAM = """
import json, sys, lightning
libraries = {name.partition(".")[0] for name in sys.modules}
import relay_diffusion.cli.main
from relay_diffusion.config import compose
from relay_diffusion.sampling.run import sample
exported, root, *options = sys.argv[1:]
relay = ["relay=one_stage", "trainer.accelerator=cpu", "seeds=0-1"]
sample(compose("sample", [*relay, f"relay.stages.base.path={exported}", f"output={root}/first"]))
loaded = {name.partition(".")[0] for name in sys.modules} - libraries
from relay_diffusion.training.run import train
stage = train(compose("train", [*options, f"run_dir={root}/run"]))
assert stage.images_seen == 8
results = sample(compose("sample", [*relay, f"relay.stages.base.path={root}/run", f"output={root}/samples"]))
assert results["sampled_now"] == 2
print(json.dumps(sorted(loaded)))
"""


@pytest.mark.slow
def test_compose_sample_and_train_suffice(small_zip, tmp_path):
    """A fresh interpreter: nothing else has registered resolvers or loaded libraries.

    Sampling loads nothing besides what Lightning loads itself, among it torchmetrics and with that matplotlib.
    """
    export_text_stage(tmp_path / "exported", 8, None)
    (tmp_path / "program.py").write_text(PROGRAM)
    options = [*TINY, "resolution=16", f"data.dataset.path={small_zip}", "trainer.max_images=8"]
    result = start(*map(str, (tmp_path / "program.py", tmp_path / "exported", tmp_path)), *options)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "first/images").rglob("*.png"))) == 2
    loaded = {*json.loads(result.stdout.splitlines()[-1])}
    assert "relay_diffusion" in loaded
    assert not loaded & {
        "diffusers",
        "huggingface_hub",
        "matplotlib",
        "pandas",
        "scipy",
        "tensorboard",
        "torchmetrics",
        "transformers",
        "wandb",
    }
