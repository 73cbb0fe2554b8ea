"""Fixtures: a tiny relay on disk, and a server that stands for the Hugging Face Hub."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hub_server import TOKEN, running_hub
from relay_diffusion.checkpoints.export import export_relay
from relay_diffusion.models import StageInfo
from support import PROJECT, TINY

STAGES = {
    "base": ["stage=base", "resolution=8"],
    "relay": ["stage=relay", "resolution=16", "stage.corruption.block=2", "stage.sampler.steps=6"],
}


@pytest.fixture(scope="session")
def relay_folder(tmp_path_factory):
    """Folder of a relay 8 -> 16 with random weights and two classes."""
    stages, origin = {}, {"file": "last.ckpt", "sha256": "0" * 64}
    generator = torch.Generator().manual_seed(0)
    for name, options in STAGES.items():
        with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
            cfg = compose("train", [*TINY, *options, "data.dataset.path=unused.zip"])
        info = StageInfo(OmegaConf.to_container(cfg.stage, resolve=True), ["dark", "light"], origin, 640)
        stages[name] = instantiate(cfg.stage, _convert_="all", _partial_=True)(info=info)
        for parameter in stages[name].denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    folder = tmp_path_factory.mktemp("relay")
    export_relay(stages, folder)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Server that huggingface_hub talks to, with an empty cache and without login."""
    constants = pytest.importorskip("huggingface_hub.constants")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


@pytest.fixture
def login(hub, monkeypatch):  # noqa: ARG001
    """Give huggingface_hub the token that the server accepts."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
