"""Log a run to one CSV file across interruptions."""

import resource

import pytest

from relay_diffusion.errors import UserError
from relay_diffusion.training.loggers import MetricsCSV, last_step, send_row


def text_of(folder):
    return (folder / "metrics.csv").read_text()


def test_a_resumed_run_appends_to_the_file(tmp_path):
    MetricsCSV(tmp_path).log_metrics({"train/loss": 0.5, "train/lr": 1e-4}, 8)
    assert text_of(tmp_path) == "images_seen,train/loss,train/lr\n8,0.5,0.0001\n"
    again = MetricsCSV(tmp_path)
    again.log_metrics({"train/lr": 2e-4, "train/loss": 0.25}, 16)
    again.log_metrics({"train/loss": 0.125}, 24)
    assert text_of(tmp_path) == "images_seen,train/loss,train/lr\n8,0.5,0.0001\n16,0.25,0.0002\n24,0.125,\n"


def test_a_row_is_appended_to_the_disk_at_once(tmp_path):
    log = MetricsCSV(tmp_path)
    log.log_metrics({"a/x": 1}, 8)
    before = log.file.stat().st_ino
    log.log_metrics({"a/x": 2}, 16)
    assert text_of(tmp_path).endswith("16,2\n")
    assert log.file.stat().st_ino == before  # not written anew


def test_new_metrics_get_columns_and_late_ones_their_row(tmp_path):
    log = MetricsCSV(tmp_path)
    for step in (8, 16):
        log.log_metrics({"train/loss": step}, step)
    log.log_metrics({"eval/fid": 3.5}, 8)
    assert text_of(tmp_path) == "images_seen,train/loss,eval/fid\n8,8,3.5\n16,16,\n"
    assert (log.last_step("train"), log.last_step("eval"), log.last_step("ev")) == (16, 8, -1)
    log.log_metrics({"train/loss": 4}, 4)
    assert text_of(tmp_path) == "images_seen,train/loss,eval/fid\n4,4,\n8,8,3.5\n16,16,\n"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("torn", ["16,0.2", "16,0.25", "1", "16,0.25,9", "\0\0"])
def test_an_incomplete_row_is_dropped(tmp_path, torn):
    whole = "images_seen,train/loss\n8,0.5\n"
    (tmp_path / "metrics.csv").write_text(whole + torn)
    log = MetricsCSV(tmp_path)
    assert log.last_step("train") == 8
    assert text_of(tmp_path) == whole + torn  # asking changes nothing
    log.log_metrics({"train/loss": 0.125}, 16)
    assert text_of(tmp_path) == whole + "16,0.125\n"


@pytest.mark.parametrize("text", ["loss,step\n1,2\n", "\n", "images_seen,a\n8,1,2\n", "images_seen,a\nx,1\n"])
def test_another_file_is_not_overwritten(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.csv is not a training log.*move it away"):
        MetricsCSV(tmp_path).log_metrics({"a/x": 1}, 8)
    assert text_of(tmp_path) == text


def test_no_file_without_rows(tmp_path):
    assert MetricsCSV(tmp_path / "log").last_step("train") == -1
    assert not (tmp_path / "log").exists()


def test_the_csv_comes_first(tmp_path):
    """A run killed between two loggers then repeats no rows."""
    order = []

    class Other(MetricsCSV.__base__):
        name = version = "other"

        def log_metrics(self, metrics, step=None):
            order.append((dict(metrics), step, text_of(tmp_path)))

        def log_hyperparams(self, params):
            pass

    loggers = [Other(), MetricsCSV(tmp_path)]
    send_row(loggers, "train", {"loss": 1.5}, 8)
    assert order == [({"train/loss": 1.5}, 8, "images_seen,train/loss\n8,1.5\n")]
    assert last_step(loggers, "train") == 8
    assert last_step([Other()], "train") == -1


def test_errors_name_a_full_disk(tmp_path):
    log = MetricsCSV(tmp_path)
    log.log_metrics({"train/loss": 1.0}, step=8)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.file.stat().st_size + 2, hard))  # no file may be larger
    try:
        with pytest.raises(UserError, match=r"metrics\.csv cannot be written: File too large"):
            log.log_metrics({"train/loss": 2.0}, step=16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    again = MetricsCSV(tmp_path)
    assert again.last_step("train") == 8
