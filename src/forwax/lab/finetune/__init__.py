"""Language models trained forwards: their files, texts, problems and runs."""
