"""The fused head on the models of transformers."""
