"""Kernels in CUDA C++, which NVRTC compiles at run time: what Triton's compiler schedules too slowly."""
