"""Web app: drawing, enlarging and comparing, and their page."""
