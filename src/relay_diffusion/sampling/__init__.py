"""Sampling from a relay, and evaluation of images."""
