"""Errors that come back through other matrices than the weights."""
