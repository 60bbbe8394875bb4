"""Losses, one a file. Each returns (sum, count) in float32 or wider; none divides: the step knows the global count."""
