"""Printed results of a sampling run."""

import pytest

from relay_diffusion.sampling.report import report


def test_metrics_including_custom_ones_precede_paths(capsys):
    results = {"mean_distance": 0.123456789, "images": 12345, "fid": 1.234567, "seeds": "0-1", "numbers": "m.json"}
    report(results | {"names": ["fid", "mean_distance", "images"]})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [["FID", "1.23"], ["mean_distance", "0.123457"], ["images", "12,345"], ["numbers", "in", "m.json"]]


@pytest.mark.parametrize(
    ("results", "line"),
    [
        ({"not_measured": {"kid": "too few images"}}, "kid not measured: too few images"),
        ({"departures": ["no post-processing"]}, "not as published no post-processing"),
        ({"block_mean_error": 0.2951}, "block means RMS error 0.30 gray levels against relay.start"),
        ({"images": 8, "sampled_now": 6}, "images 8 resumed 2 of these images existed already"),
        ({"images": 8, "sampled_now": 8}, "images 8"),
        ({"saved_evaluations": 8}, "early hand-over network evaluations saved per image: 8"),
    ],
)
def test_warnings_are_printed(capsys, results, line):
    report(results)
    assert " ".join(capsys.readouterr().out.split()) == line
