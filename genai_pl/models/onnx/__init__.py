"""ONNX: graphs of our models, their quantization to 8 bits, and decoding with ONNX Runtime."""
