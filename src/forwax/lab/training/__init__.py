"""Training: a problem, its compiled steps, a run's folder, the session that goes through it."""
