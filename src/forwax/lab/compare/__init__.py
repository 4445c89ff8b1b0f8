"""`forwax compare`: one model under several rules, side by side.

`setup` makes a comparison ready, `rates` chooses learning rates to try, `bench` makes the parts,
`findings` gathers what they found, `tables` and `forwax.lab.pictures.comparison` show it.
"""
