"""From encoded images on disk to uint8 batches; knows nothing of models."""
