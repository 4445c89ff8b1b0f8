"""Ren et al. 2023, "Scaling Forward Gradient With Local Losses" (2210.03310): runs and table."""
