"""A package of kernels as `minbert.kernels.triton` is one, for the tests of `ahead`."""
