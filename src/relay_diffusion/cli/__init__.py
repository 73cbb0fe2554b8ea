"""Commands. Each is also `python -m relay_diffusion.cli.NAME`."""
