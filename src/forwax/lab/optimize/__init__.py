"""`forwax optimize`: descent on test functions, by backprop and by forward gradients."""
