"""Jobs can be followed and cancelled."""

import threading

import pytest
import torch

from relay_diffusion.app.jobs import CancelledJobError, Job, follow
from relay_diffusion.app.studio import build_studio

X = torch.zeros(3, 1, 2, 2)


def test_a_job_counts_images_of_each_evaluation(relay):
    job = Job()
    with relay.observed(tile_observer=job):
        relay.sample([0, 1, 2])
    assert job.done == 3 * relay.evaluations()
    assert job.stage == "relay"
    relay.sample([0])
    assert job.done == 3 * relay.evaluations()


def test_results_come_after_signs_of_life():
    release = threading.Event()
    results = follow(lambda: release.wait() and "done", Job(), seconds=0.01)
    assert [next(results), next(results)] == [None, None]
    release.set()
    assert [result for result in results if result is not None] == ["done"]


def test_closing_cancels_the_job_and_waits_for_its_thread():
    job, ended = Job(), []

    def work():
        try:
            while True:
                job("base", X, X, X)
        except CancelledJobError:
            ended.append(job.done)
            raise

    results = follow(work, job, seconds=0.01)
    assert next(results) is None
    results.close()
    assert ended == [job.done]
    assert job.done % 3 == 0


def test_errors_are_raised_where_the_job_is_followed():
    with pytest.raises(ZeroDivisionError):
        list(follow(lambda: 1 / 0, Job(), seconds=0.01))


def test_a_studio_cancels_its_jobs(relay):
    studio = build_studio("tiny", relay, {})
    jobs = [studio.new_job(), studio.new_job()]
    jobs[0]("base", X, X, X)
    studio.cancel_jobs()
    for job in jobs:
        with pytest.raises(CancelledJobError):
            job("base", X, X, X)
