"""Captioned images, training, resume, samples by prompt and exports of a text relay, end to end."""

import shutil
import signal

import pytest
import torch

from pictures_on_disk import encoded, pixels, write_folder
from relay_diffusion import load_relay
from relay_diffusion.cli.convert_checkpoint import ConvertOptions
from relay_diffusion.cli.convert_checkpoint import convert as export_run
from relay_diffusion.cli.publish import PublishOptions, publish
from relay_diffusion.data import convert as images
from relay_diffusion.errors import UserError
from support import assert_same_weights, weights_of

pytest.importorskip("huggingface_hub")  # publish needs it for folders too
pytest.importorskip("transformers")

from tiny_encoders import save_encoder

SEEDS = range(4)
PROMPTS = ["a red fox", "the traffic light", "asleep", ""]


def write_captioned_zip(folder):
    """Convert 16 files of 16x16 with a text file of captions beside each; return the zip."""
    captions = ("red\na red fox", "asleep\nthe traffic light")
    files = {f"{n:02d}.png": encoded(pixels(n, 16) // 2 + 127 * (n % 2)) for n in range(16)}
    files |= {f"{n:02d}.txt": captions[n % 2].encode() for n in range(16)}
    options = images.ConvertOptions(
        source=str(write_folder(folder / "files", files)),
        destination=str(folder / "images.zip"),
        resolution=16,
        classes=images.Classes.none,
        captions=images.Captions.txt,
    )
    images.convert(options)
    return folder / "images.zip"


@pytest.mark.slow
def test_an_exported_relay_draws_the_images_of_its_training_runs(fit, tmp_path, signal_at):
    """Train both stages, one of them with an interruption, and export them.

    The export needs the folder of the text encoder, but neither the runs nor the data.
    """
    encoder, data = save_encoder(tmp_path / "encoder", "bert"), write_captioned_zip(tmp_path)
    common = (
        "text=minilm", f"text.path={encoder}", "text.max_tokens=10", f"data.text_cache={tmp_path / 'cache'}",
        f"data.dataset.path={data}", "data.dataset.subset=''", "network.num_classes=0", "network.dropout=0.1",
        "stage.label_dropout=0.2", "stage.optimizer.lr=1e-2",
    )  # fmt: skip

    def train_base(directory):
        return fit(directory, 24, *common, "resolution=8", "stage.guidance_scale=2")

    fit("relay", 24, *common, "resolution=16", "stage.corruption.block=2", stage="relay")
    train_base("whole")
    signal_at(signal.SIGTERM, 12)
    with pytest.raises(SystemExit):
        train_base("base")
    assert train_base("base").images_seen == 24
    assert_same_weights(*(weights_of(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "base")))

    runs = {name: tmp_path / name for name in ("base", "relay")}
    relay = load_relay(runs)

    def draw(relay, negative=None):
        return relay.sample_stages(SEEDS, prompt=PROMPTS, negative_prompt=negative)

    drawn, guided = draw(relay), draw(relay, negative="light")
    assert [(*image.shape,) for image in drawn.values()] == [(4, 3, 8, 8), (4, 3, 16, 16)]
    assert_prompts_matter(relay, relay.finish(drawn["base"]))
    assert (drawn["base"] - guided["base"]).abs().amax((1, 2, 3)).min() > 1e-3
    for batches in ([0, 1], [2, 3]), ([0], [1, 2, 3]):
        split = [relay.sample(batch, prompt=[PROMPTS[seed] for seed in batch]) for batch in batches]
        torch.testing.assert_close(torch.cat(split), drawn["relay"], rtol=0, atol=1e-4)  # equal up to rounding

    source = ",".join(f"{name}={path}" for name, path in runs.items())
    publish(PublishOptions(source=source, destination=str(tmp_path / "published")))
    exports = {name: tmp_path / "exports" / name for name in runs}
    for name, path in runs.items():
        export_run(ConvertOptions(source=str(path), destination=str(exports[name])))
    for path in (*runs.values(), tmp_path / "whole", tmp_path / "files", tmp_path / "cache"):
        shutil.rmtree(path)
    data.unlink()
    for place in (tmp_path / "published", exports):
        exported = load_relay(place)
        assert_same_images(draw(exported), drawn)
        assert_same_images(draw(exported, negative="light"), guided)

    shutil.move(encoder, tmp_path / "moved")
    with pytest.raises(UserError, match="which is no folder here"):
        draw(load_relay(tmp_path / "published"))
    assert_same_images(draw(load_relay(tmp_path / "published", text_path=str(tmp_path / "moved"))), drawn)


def assert_same_images(a, b):
    """To the last bit, at every stage."""
    assert a.keys() == b.keys()
    for name, image in a.items():
        assert torch.equal(image, b[name]), name


def assert_prompts_matter(relay, start):
    """Require that the prompt changes the images of the first stage, and how the second one enlarges `start`."""
    prompts = "a red fox", "the traffic light"
    drawn = [relay.sample_stages(SEEDS, prompt=prompt)["base"] for prompt in prompts]
    enlarged = [relay.without_first().sample(SEEDS, start=start, prompt=prompt) for prompt in prompts]
    for one, other in (drawn, enlarged):
        assert (one - other).abs().amax((1, 2, 3)).min() > 1e-3
