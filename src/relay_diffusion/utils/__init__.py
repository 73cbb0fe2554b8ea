"""Files, processes, messages and pictures. Importing a module of it loads no torch."""
