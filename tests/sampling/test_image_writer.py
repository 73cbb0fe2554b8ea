"""Write images in threads while sampling continues."""

import threading
from types import SimpleNamespace

import pytest
import torch

from relay_diffusion.errors import UserError
from relay_diffusion.models.relay import Samples
from relay_diffusion.sampling.callbacks.image_writer import ImageWriter
from relay_diffusion.sampling.image_store import ImageStore
from relay_diffusion.sampling.plan import Plan
from relay_diffusion.utils.parallel import MAX_THREADS

COUNT = 3 * MAX_THREADS
PIXELS = torch.randint(0, 256, (COUNT, 3, 8, 8), dtype=torch.uint8)
PLAN = Plan([f"{number // 10}/{number}" for number in range(COUNT)], list(range(COUNT)), [-1] * COUNT)
TRAINER = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(barrier=lambda: None))
LATE = 10  # seconds after which a thread has failed


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path, {})


@pytest.fixture
def writer(store):
    writer = ImageWriter(store, PLAN, range(1, COUNT))
    writer.setup(TRAINER, None, "predict")
    yield writer
    writer.on_exception(TRAINER, None, KeyboardInterrupt())


def write(writer, positions):
    writer.write_on_batch_end(TRAINER, None, Samples(torch.tensor(positions), PIXELS[positions], {}))


def test_all_missing_images_are_written_when_sampling_ends(writer, store):
    threads = threading.active_count()
    write(writer, list(range(20)))
    write(writer, list(range(20, COUNT)))
    writer.on_predict_end(TRAINER, None)
    assert [name in store for name in PLAN.names] == [False] + [True] * (COUNT - 1)
    read = torch.cat(list(store.images(PLAN.names[1:], (8, 8)).batches(COUNT)))
    assert torch.equal(read, PIXELS[1:])
    assert threading.active_count() == threads


def test_a_batch_is_written_while_the_next_one_is_sampled(writer, store, monkeypatch):
    next_batch = threading.Event()
    whole = ImageStore.write
    monkeypatch.setattr(ImageStore, "write", lambda *given: next_batch.wait(LATE) and whole(*given))
    write(writer, [1, 2, 3])
    assert PLAN.names[1] not in store
    next_batch.set()
    write(writer, [4])
    assert all(PLAN.names[position] in store for position in (1, 2, 3))


def test_errors_of_threads_stop_the_run(writer, store):
    (store.folder / "0").write_text("a file where a folder must be")
    write(writer, [1])
    with pytest.raises(UserError, match=r"^[^\n]*0/1\.png cannot be written: (Not a directory|File exists)$"):
        write(writer, [2])
    with pytest.raises(UserError, match=r"0/2\.png cannot be written"):
        writer.on_predict_end(TRAINER, None)


def test_finished_batches_are_written_if_sampling_is_interrupted(writer, store):
    threads = threading.active_count()
    write(writer, list(range(COUNT)))
    writer.on_exception(TRAINER, None, SystemExit(143))
    assert all(name in store for name in PLAN.names[1:])
    assert threading.active_count() == threads


def test_an_interruption_before_sampling_is_no_error(store):
    ImageWriter(store, PLAN, [1]).on_exception(TRAINER, None, KeyboardInterrupt())
