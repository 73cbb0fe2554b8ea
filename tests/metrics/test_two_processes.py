"""Metrics on two processes agree with one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from fake_inception import PixelFeatures, pixel_reference, random_images
from processes import Process, ended
from relay_diffusion.metrics import (
    Evaluator,
    FIDMetric,
    InceptionScoreMetric,
    KIDMetric,
    PrecisionRecallMetric,
    SFIDMetric,
)
from support import PROJECT, pythonpath

COUNT = 11
SHARES = {
    "7 and 4": ([0, 10, 1, 4, 3, 6, 9], [8, 2, 7, 5]),
    "all and none": (list(range(COUNT)), []),
    "none and all": ([], list(range(COUNT))),
    "too few": ([1], [0]),
}


def build() -> Evaluator:
    metrics = {
        "fid": FIDMetric(),
        "sfid": SFIDMetric(),
        "inception_score": InceptionScoreMetric(split_size=3),
        "precision_recall": PrecisionRecallMetric(nearest_k=2),
        "kid": KIDMetric(),
    }
    return Evaluator(PixelFeatures(), pixel_reference(random_images(30, 1)), metrics)


def feed(evaluation: Evaluator, positions: list[int]) -> None:
    images = random_images(COUNT, 2)
    for at in torch.tensor(positions, dtype=torch.int64).split(3):
        if len(at):
            evaluation.update(images[at], at)


def _rank(rank: int, store: str, answer: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    evaluation = build()
    found = {}
    for name, shares in SHARES.items():
        feed(evaluation, shares[rank])
        found[name] = evaluation.compute(), dict(evaluation.skipped)
        if name == "7 and 4":
            assert evaluation.compute() == found[name][0], "a second time, nothing is counted twice"
        evaluation.reset()
    Path(answer).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    answers = [tmp_path / f"{rank}.json" for rank in range(2)]
    path = pythonpath(PROJECT / "tests")
    ranks = [
        Process(tmp_path / f"{rank}.txt", [__file__, rank, tmp_path / "store", answer], PYTHONPATH=path)
        for rank, answer in enumerate(answers)
    ]
    with ended(ranks):
        for process in ranks:
            assert process.wait() == 0, process.text()
    evaluation = build()
    feed(evaluation, list(range(COUNT)))
    whole = evaluation.compute()
    assert set(whole) == {"fid", "sfid", "inception_score", "precision", "recall", "kid", "images"}
    for answer in answers:
        found = json.loads(answer.read_text())
        for name in ("7 and 4", "all and none", "none and all"):
            assert found[name] == [pytest.approx(whole, rel=1e-6), {}], name
        numbers, skipped = found["too few"]
        assert set(numbers) == {"fid", "sfid", "inception_score", "kid", "images"}
        assert numbers["images"] == 2
        assert skipped == {
            "precision_recall": "precision and recall need more than 2 generated images, not 2; give more"
        }


if __name__ == "__main__":  # a rank
    _rank(int(sys.argv[1]), *sys.argv[2:])
