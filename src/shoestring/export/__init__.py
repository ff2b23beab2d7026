"""Taking a model to where people work: one file, diffusers, ONNX, torch.export, released layouts, a hub."""
