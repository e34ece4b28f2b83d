"""Kernels in CUDA C++, which NVRTC compiles at run time. Triton's compiler schedules these products too slowly."""
