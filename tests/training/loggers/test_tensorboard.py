"""Log to TensorBoard, read back from its event files."""

import io

import pytest
from PIL import Image

from relay_diffusion.errors import UserError
from relay_diffusion.training.loggers.tensorboard import TensorBoardRun
from relay_diffusion.utils import installed

pytest.importorskip("tensorboard")


def events(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory / "tensorboard"), size_guidance={"tensors": 0}).Reload()


@pytest.mark.slow
def test_a_run_has_scalars_pictures_and_settings(fit, tmp_path):
    """A resumed run adds rows, none twice."""
    every = [f"callbacks.{name}.every_n_images=8" for name in ("log", "grid")]
    for images in (16, 24):
        fit("run", images, "network.channel_mult=[1]", "logger=tensorboard", *every)
    found = events(tmp_path / "run")
    assert [event.step for event in found.Scalars("train/loss")] == [8, 16, 24]
    assert [event.step for event in found.Images("samples/base")] == [8, 16, 24]
    settings = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"stage.optimizer.lr" in settings
    assert b"eval/fid" in found.SummaryMetadata("_hparams_/experiment").plugin_data.content
    assert "eval/fid" not in found.Tags()["scalars"]  # a column, without a value


def test_a_table_is_pictures_and_a_text(tmp_path):
    run = TensorBoardRun(tmp_path)
    run.log_image_table(
        "relay/samples", ["image", "seed"], [[Image.new("L", (3, 2)), 7], [Image.new("L", (5, 4)), 8]], 6
    )
    run.finalize("success")
    found = events(tmp_path)
    sizes = [
        Image.open(io.BytesIO(found.Images(f"relay/samples/{row}_image")[0].encoded_image_string)).size
        for row in (0, 1)
    ]
    assert sizes == [(3, 2), (5, 4)]
    (text,) = found.Tensors("relay/samples/text_summary")
    lines = ["| image | seed |", "| --- | --- |", "| relay/samples/0_image | 7 |", "| relay/samples/1_image | 8 |"]
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (6, "\n".join(lines))


def test_the_library_is_named_if_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(installed, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"logger=tensorboard needs the library .*: pip install -e '\.\[tens.*"):
        TensorBoardRun(tmp_path)
