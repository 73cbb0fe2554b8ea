"""Sample from a relay and measure it: python sample.py relay=NAME [mode=evaluate] [KEY=VALUE ...]."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from relay_diffusion.cli import clear_errors, command_line
from relay_diffusion.config import register_resolvers, validate_sampling

register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="sample")
def main(cfg: DictConfig) -> None:
    """Compose, validate, build, predict or evaluate."""
    with clear_errors():
        validate_sampling(cfg)

        from relay_diffusion.sampling import sample  # torch and lightning: only once the settings are sound

        sample(cfg)


if __name__ == "__main__":
    command_line(main, Path(__file__).parent / "conf" / "sample.yaml")
