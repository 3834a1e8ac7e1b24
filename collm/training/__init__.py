"""The training loop, its assembly from settings, and evaluation."""
