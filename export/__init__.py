"""Thaw's export: one ONNX file that gives what PyTorch gave, and inference without torch."""
