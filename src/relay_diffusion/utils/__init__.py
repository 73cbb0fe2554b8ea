"""Files, processes, messages and pictures; no module imports torch on loading."""
