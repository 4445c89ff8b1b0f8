"""Several processes that train one run: who they are, what they agree on, who writes, who died."""
