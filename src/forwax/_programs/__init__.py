"""Traced programs: the only package that reads jaxprs; it knows nothing of noise."""
