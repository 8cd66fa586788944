"""The project's own NVFP4 kernels, in Triton: compiled on a GPU, interpreted on a CPU.

Of the reference they take `nvfp4ref.formats` and nothing else: a kernel that shared arithmetic
with its oracle would share its bugs.
"""
