"""Triton kernels, nothing else: what runs on the GPU, told apart from who calls it (patchscore/engines)."""
