"""The command line of forwax, with the extra `lab`.

A command is a folder (`train`, `compare`, `optimize`, `ren2023`, `data`) or a file (`diagnose`).
What they share: `experiments` names models on data, `settings` and `options` say how to train,
`choices` and `optimizers` build the rule and the optimiser from them, `problem` is an experiment
made ready, `style` is the look of all pictures.
"""
