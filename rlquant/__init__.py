"""rlquant: quantize trained policies and prove how much reward they keep.

Importing the package loads neither torch nor transformers; each part loads what it needs when it is used.
"""

__version__ = "0.1.0"
