"""Run `wandb agent` with scripts/wandb_sweep.yaml, where the server is replaced."""

import os
import queue
import sys
from pathlib import Path

import pytest
import yaml
from wandb.apis.public import sweeps
from wandb.wandb_agent import Agent

from support import PROJECT, TINY, pythonpath
from wandb_files import of_type, records, rows_of

SWEEP = yaml.safe_load((PROJECT / "scripts/wandb_sweep.yaml").read_text())
CHOSEN = {"stage.optimizer.lr": 2e-3, "stage.label_dropout": 0.1}


@pytest.fixture
def agent(tmp_path, monkeypatch, small_zip):
    """Return an agent whose server starts one run of a tiny network, and ends it when it has finished."""
    tiny = [
        *TINY, "resolution=16", f"data.dataset.path={small_zip}", "data.dataset.subset=", "trainer.max_images=8",
        "network.attention_resolutions=[]", "callbacks.evaluation.count=8",
        f"callbacks.evaluation.evaluator.reference.cache={tmp_path / 'reference'}",
        "callbacks.evaluation.evaluator.inception._target_=pixel_inception.pixels_in_a_process_of_their_own",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    command = SWEEP["command"][:-1] + tiny + SWEEP["command"][-1:]
    start = {
        "type": "run",
        "run_id": "fresh1",
        "program": SWEEP["program"],
        "args": {key: {"value": value} for key, value in CHOSEN.items()},
    }
    waiting = [start]

    def heartbeat(api, agent_id, metrics, status):  # noqa: ARG001
        if waiting:
            return [waiting.pop()]
        return [] if status else [{"type": "exit"}]

    monkeypatch.setattr(sweeps, "_sweep_with_runs", lambda *_: {"config": yaml.safe_dump({"command": command})})
    monkeypatch.setattr(sweeps, "_register_agent", lambda *_, **__: {"id": "agent"})
    monkeypatch.setattr(sweeps, "_agent_heartbeat", heartbeat)
    monkeypatch.setattr("wandb.Api", lambda: None)
    monkeypatch.setattr(Agent, "POLL_INTERVAL", 0.2)
    monkeypatch.chdir(PROJECT)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", pythonpath(PROJECT / "tests"))
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "")  # the agent sets these for its runs
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    return Agent(None, queue.Queue(), sweep_id="sweep1", count=1)


def test_an_agent_trains_with_the_options_of_the_server(agent, tmp_path):
    agent.run()
    assert agent._failed == 0
    run_dir = tmp_path / "run"
    (part,) = records(run_dir)
    (run,) = of_type(part, "run")
    assert (run["run_id"], run["sweep_id"]) == ("fresh1", "sweep1")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (config["stage"]["optimizer"]["lr"], config["stage"]["label_dropout"]) == tuple(CHOSEN.values())
    assert config["run_id"] == "fresh1"
    (row,) = rows_of([part])
    assert row[SWEEP["metric"]["name"]] > 0
