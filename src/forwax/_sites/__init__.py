"""Sites: the places in a traced program where a parameter meets data, and noise on them."""
