"""Progress within a batch."""

import time
from types import SimpleNamespace

import pytest
import torch

from relay_diffusion.models.relay import Relay, SampleBatch
from relay_diffusion.sampling.callbacks import sampling_progress
from relay_diffusion.sampling.callbacks.sampling_progress import SamplingProgress
from support import tiny_stage

TRAINER = SimpleNamespace(is_global_zero=True, world_size=1)
BATCH = SampleBatch(torch.tensor([0, 1]), torch.tensor([7, 8, 8]), torch.tensor([1, 0, 0]), None)


@pytest.fixture
def relay():
    return Relay({"a": tiny_stage(4), "b": tiny_stage(8, 2)})


@pytest.fixture
def shown(monkeypatch):
    """Return the list of shown numbers of images."""
    numbers = []
    monkeypatch.setattr(sampling_progress, "SECONDS", 60)  # only explicit looks
    monkeypatch.setattr("relay_diffusion.utils.progress._PlainLines.show", lambda _, done, note: numbers.append(done))  # noqa: ARG005
    return numbers


def test_the_bar_moves_with_every_evaluation(relay, shown, monkeypatch):
    callback = SamplingProgress(6, done=1)
    callback.on_predict_start(TRAINER, relay)
    denoise = type(relay.stages[0].denoiser).forward
    monkeypatch.setattr(type(relay.stages[0].denoiser), "forward", lambda *given: (callback.look(), denoise(*given))[1])
    callback.on_predict_batch_start(TRAINER, relay, BATCH, 0)
    samples = relay.predict_step(BATCH, 0)
    evaluations = sum(sampler.evaluations for sampler in relay.samplers.values())
    assert shown == pytest.approx([1 + 2 * k / evaluations for k in range(1, evaluations)])
    callback.on_predict_batch_end(TRAINER, relay, samples, BATCH, 0)
    assert shown[-1] == 3
    callback.on_predict_batch_start(TRAINER, relay, BATCH, 1)
    relay.predict_step(BATCH, 1)
    assert 3 < shown[evaluations] < 4
    callback.on_predict_end(TRAINER, relay)
    assert relay.observers == []


def test_evaluations_on_a_gpu_count_when_they_are_finished(relay, shown, monkeypatch):
    finished, recorded = set(), []

    class Event:
        def record(self):
            recorded.append(self)

        def query(self):
            return self in finished

    devices = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    callback = SamplingProgress(4)
    callback.on_predict_start(TRAINER, relay)
    callback._device = torch.device("cuda:1")
    callback.on_predict_batch_start(TRAINER, relay, BATCH, 0)
    relay.predict_step(BATCH, 0)
    callback.look()
    assert (shown, devices) == ([], [callback._device])
    finished |= set(recorded[:3])
    finished.add(recorded[4])  # a later one waits for those before
    callback.look()
    assert shown == [2 * 3 / len(recorded)]
    finished |= set(recorded)
    callback.look()
    assert shown[1:] == [2]
    callback.on_exception(TRAINER, relay, KeyboardInterrupt())


def test_ranks_count_as_equally_fast_and_repeated_images_do_not_count(relay, shown):
    callback, trainer = SamplingProgress(3), SimpleNamespace(is_global_zero=True, world_size=2)
    callback.on_predict_start(trainer, relay)
    callback.on_predict_batch_start(trainer, relay, BATCH, 0)
    callback.on_predict_batch_end(trainer, relay, relay.predict_step(BATCH, 0), BATCH, 0)
    assert shown == [3]  # not 4
    callback.on_predict_end(trainer, relay)


def test_other_ranks_report_nothing(relay, shown):
    callback, trainer = SamplingProgress(4), SimpleNamespace(is_global_zero=False, world_size=2)
    callback.on_predict_start(trainer, relay)
    assert relay.observers == []
    callback.on_predict_batch_start(trainer, relay, BATCH, 0)
    callback.on_predict_batch_end(trainer, relay, relay.predict_step(BATCH, 0), BATCH, 0)
    callback.on_predict_end(trainer, relay)
    assert shown == []


def test_a_thread_moves_the_bar_within_a_batch(relay, capsys, monkeypatch):
    monkeypatch.setattr(sampling_progress, "SECONDS", 0.001)
    looked = []
    look = SamplingProgress.look
    monkeypatch.setattr(SamplingProgress, "look", lambda self: (look(self), looked.append(1)))
    callback = SamplingProgress(40)
    callback.on_predict_start(TRAINER, relay)
    callback.on_predict_batch_start(TRAINER, relay, BATCH._replace(positions=torch.arange(40)), 0)
    relay.predict_step(BATCH, 0)
    before, deadline = len(looked), time.monotonic() + 60
    while len(looked) < before + 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(looked) >= before + 2
    callback.on_predict_end(TRAINER, relay)
    assert capsys.readouterr().out.startswith("sampling: ")
