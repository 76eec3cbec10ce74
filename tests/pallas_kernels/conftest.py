"""Fixtures of these tests."""

from tests.pallas_kernels.interpreter import interpreted

__all__ = ["interpreted"]
