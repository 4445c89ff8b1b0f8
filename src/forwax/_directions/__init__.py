"""Weight directions: most are never formed, but kept as factors, or as signs drawn where used."""
