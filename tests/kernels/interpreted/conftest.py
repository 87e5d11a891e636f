"""The interpreter must be chosen before Triton is imported, so these tests run in a process of their own."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
