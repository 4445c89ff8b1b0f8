"""Training: a problem, its compiled steps, the folder of a run, and the session that goes through it."""
