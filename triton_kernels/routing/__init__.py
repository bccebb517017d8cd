"""The router: logits, choice of experts, and their gradients."""
