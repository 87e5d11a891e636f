"""Tests of sparsekit.kernels; those in `interpreted` run in a process of their own."""
