"""Operators by torch_npu's kernels. Each file registers its own; none imports torch_npu, which the device has loaded.

A kernel that cannot take a call (a type, a size) leaves it to an implementation of the operator in plain torch, which
gives the same numbers. Where torch_npu has no derivative, it is written here.
"""
