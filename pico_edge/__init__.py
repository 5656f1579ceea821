"""pico-edge: train a small GPT on your own text, export it to one ONNX file, run it anywhere."""

__version__ = "0.1.0"
