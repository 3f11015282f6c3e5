"""Implementations of operators by libraries of CUDA kernels; each is used only where its package is installed."""
