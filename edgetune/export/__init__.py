"""Making a folder of training artifacts from a model: the room that knows torch and ONNX Runtime at once."""
