"""What tools/export.py offers, for its --help, which loads no torch."""

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "torch-export": ".pt2", "openvino": ".xml"}
"""Formats, and the ending of the main file of each."""
OPSET = 17
OPSETS = range(16, 21)  # from the first with GridSample to the last that torch's tracing exporter knows
FORMS = ("grid_sample", "gather")
"""How deformable attention is written: one ``grid_sample`` a level, or gathers of the four pixels around a sample."""
