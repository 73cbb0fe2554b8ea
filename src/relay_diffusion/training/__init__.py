"""Training of one stage."""
