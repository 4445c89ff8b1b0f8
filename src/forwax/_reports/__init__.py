"""Tables for people: what a loss's sites are, what rules give and cost."""
