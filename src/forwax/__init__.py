"""forwax: train and optimise JAX programs without backpropagation."""
