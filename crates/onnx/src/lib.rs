//! ONNX reader and writer (QDQ), ONNX Runtime sessions, timing probes.
