"""nvfp4check: is this FP4 model computed, stored and served as it should be?"""

__version__ = "0.1.0"
