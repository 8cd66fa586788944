"""The forward pass of DeepSeek-V3, to be read from top to bottom.

`config` and `norm`, `rotary`, `linear`, `cache`, `attention`, `routing`, `moe`, `model`, `mtp`.
Functions take tensors and small frozen containers; attributes carry the checkpoint's names.
"""
