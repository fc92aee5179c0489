"""A folder of training artifacts: its manifest, read and checked, and the plan of a run from it. Pure: no torch, no ONNX."""
