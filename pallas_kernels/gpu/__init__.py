"""What kernels of both families share: registers and lanes of a warpgroup, launching Triton."""
