"""Weight directions that are never formed: factors, and signs that are drawn where they are used."""
