"""What the command line offers, by name: settings, rules, optimizers, experiments, the columns of a paper."""
