"""Callbacks of sampling."""
