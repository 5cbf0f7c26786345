"""The fused operators, one room each: a file, or a folder with the kernels in forward.py and backward.py.

``common`` is what they share. README.md tells how a kernel here is built.
"""
