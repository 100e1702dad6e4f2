"""What a student learns from: divergences on sparse targets, and the fused head and loss."""
