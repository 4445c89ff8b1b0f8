"""`forwax compare`: one model under several rules, side by side.

`setup` makes a comparison ready, `bench` its parts (`timing`, `rates`, `training`), `findings`
gathers what they found, `tables` and `picture` show it.
"""
