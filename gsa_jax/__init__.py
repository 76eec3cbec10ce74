"""Gated Slot Attention and its relatives in JAX."""
