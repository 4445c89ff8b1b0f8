"""Passes over a program with sites: one that keeps, one that walks from site to site, one that replays."""
