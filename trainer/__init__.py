"""Thaw's trainer: two-phase transfer learning that records what unfreezing did."""
