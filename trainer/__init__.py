"""Thaw's trainer: two-phase transfer learning that records what unfreezing did."""

__version__ = "0.1.0"
