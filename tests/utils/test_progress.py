import time

import pytest

from relay_diffusion.utils.progress import QUIET, progress


def shown(capsys, **options):
    with progress("counting", 4, **options) as advance:
        for _ in range(2):
            advance(2)
    assert advance.done == 4
    return capsys.readouterr().out.splitlines()


def test_a_log_file_gets_the_first_and_the_last_line(capsys):
    assert shown(capsys) == ["counting: 2/4 images", "counting: 4/4 images"]


def test_the_end_is_reported_once(capsys):
    with progress("counting", 4) as advance:
        advance(4)
        advance.to(4)
    assert capsys.readouterr().out == "counting: 4/4 images\n"


def test_a_resumed_run_continues_the_count(capsys):
    with progress("counting", 4, done=2) as advance:
        advance(2, "note")
    assert capsys.readouterr().out == "counting: 4/4 images  note\n"


@pytest.mark.parametrize("how", ["other rank", "quiet"])
def test_disabled_or_quiet_progress_prints_nothing(capsys, monkeypatch, how):
    monkeypatch.setenv(QUIET, "1" if how == "quiet" else "")
    assert shown(capsys, enabled=how == "quiet") == []


def test_plain_lines_estimate_the_remaining_time(capsys, monkeypatch):
    """Time before the first report, as for compilation, does not count."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress("counting", 100, done=10) as advance:
        for seconds, count in [(500, 10), (20, 20), (1, 1), (39, 39), (5, 20)]:
            now += seconds
            advance(count, "note")
    assert capsys.readouterr().out.splitlines() == [
        "counting: 20/100 images  note",
        "counting: 40/100 images  ETA 0:01:00  note",
        "counting: 80/100 images  ETA 0:00:20  note",
        "counting: 100/100 images  note",
    ]


def test_parts_of_units_are_shown_as_whole_ones(capsys):
    with progress("counting", 4) as advance:
        advance(0.75)
        advance.to(4)
    assert advance.done == 4
    assert capsys.readouterr().out.splitlines() == ["counting: 0/4 images", "counting: 4/4 images"]
