"""Passes over a program with sites: one keeps, one walks from site to site, one replays."""
