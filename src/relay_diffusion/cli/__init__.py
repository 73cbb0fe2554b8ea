"""Commands, each run by `python -m relay_diffusion.cli.NAME`."""
