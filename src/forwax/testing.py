"""Checks of rules and tangents."""
