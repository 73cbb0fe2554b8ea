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


def test_a_resumed_run_continues_the_count(capsys):
    with progress("counting", 4, done=2) as advance:
        advance(2, "note")
    assert capsys.readouterr().out == "counting: 4/4 images  note\n"


@pytest.mark.parametrize("how", ["other rank", "quiet"])
def test_disabled_or_quiet_progress_prints_nothing(capsys, monkeypatch, how):
    monkeypatch.setenv(QUIET, "1" if how == "quiet" else "")
    assert shown(capsys, enabled=how == "quiet") == []
