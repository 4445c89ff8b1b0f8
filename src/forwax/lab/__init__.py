"""The command line of forwax, with the extra `lab`.

A command is a module of `commands`; what it computes lies in a folder of its own (`compare`,
`optimize`, `ren2023`, `data`, `training`), its picture in `pictures`. What they share: `catalogue`
names models on data, says how to train and builds rules and optimizers; `training.problem` is an
experiment made ready; `flags` is how options read, `report` what commands leave behind, `style` the
look of all pictures.
"""
