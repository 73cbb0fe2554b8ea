"""Train one stage of a relay: python train.py experiment=NAME [KEY=VALUE ...]; --help shows what can be set."""

from relay_diffusion.cli.main import train

if __name__ == "__main__":
    train()
