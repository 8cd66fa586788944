"""The reference forward of a whole checkpoint, streamed from disk in bounded memory.

The arithmetic is `nvfp4ref.deepseek_v3`; what is here reads weights ahead of their use, dequantises
them a few rows at a time, and writes a run directory that is its own journal: a run killed at any
moment continues with `--resume` and ends with the same bytes. Experts may be computed by the
workers of an engine (`spread`), to the same bytes again.
"""
