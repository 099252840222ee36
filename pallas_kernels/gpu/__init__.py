"""Parts that several kernels share: lanes, registers and rotation on Hopper, launches and functions of Triton."""
