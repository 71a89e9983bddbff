"""The operators inside autograd and torch.compile."""
