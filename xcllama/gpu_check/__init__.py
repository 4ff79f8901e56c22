"""What proves, times and trains this project on a GPU, in parts that keep to a time: `python scripts/gpu_check.py`.

`driver` runs each part as a process of its own; `kernels`, `model` and `train` are the parts; `packing` writes what a
machine without a network needs. Without a GPU, `--dry-run` runs everything on tiny sizes.
"""
