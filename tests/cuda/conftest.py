"""Tests of Triton kernels without a GPU: `cases/` runs in processes of its own, see test_triton.py."""

import os

collect_ignore = ["test_triton.py"] if "TRITON_CASES" in os.environ else ["cases"]
