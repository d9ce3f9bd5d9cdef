"""minbert's kernels."""
if __name__ != "minbert.kernels":
    raise ImportError("import minbert.kernels, not kernels")
