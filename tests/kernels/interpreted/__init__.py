"""Triton kernels in Triton's interpreter, on the CPU: see ../test_interpreted.py."""
