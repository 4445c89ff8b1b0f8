"""Labelled texts, and files out of packages."""
