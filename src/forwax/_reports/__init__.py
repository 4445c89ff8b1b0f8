"""Reports for people: what sites a loss has (`explain`), what rules give and cost (`diagnose`).

Both print one kind of table (`table`); `timing` is the timer of `benchmarks/` and the lab too.
"""
