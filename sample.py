"""Sample from a relay and measure it: python sample.py relay=NAME [mode=evaluate] [KEY=VALUE ...]."""

from relay_diffusion.cli.main import sample

if __name__ == "__main__":
    sample()
