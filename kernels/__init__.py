"""Layers with zeros in a pattern that a GPU can skip, and the training step of soft masks, as Triton kernels.

Importing this needs neither Triton nor a GPU: every op runs in plain torch on the CPU.
"""
