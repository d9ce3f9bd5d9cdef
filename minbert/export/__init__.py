"""A run's model for other programs: an ONNX graph, or a directory of transformers or sentence-transformers.

`python -m minbert.export RUN --to onnx --out DIR`.
"""
