"""Pallas GPU kernels of the recurrences in `gsa_jax.ops`, one kernel a file.

Nothing here imports `gsa_jax`: a kernel depends on jax alone and can be read, lowered and timed on its own.
"""
