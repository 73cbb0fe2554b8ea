"""Train one stage of a relay: python train.py experiment=NAME [KEY=VALUE ...]; --help shows what can be set."""

from relay_diffusion.commands import train

if __name__ == "__main__":
    train()
