"""ONNX graphs of models: export, quantization, and decoders run by ONNX Runtime."""
