"""What other libraries need to train, save and load factorized models; each file needs its library."""
