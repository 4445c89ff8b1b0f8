"""What the command line offers, by name: settings, rules, optimizers, experiments, columns."""
