"""Engine `fused`: exact sums to a stated precision on the GPU, in Triton, without a matrix of logits."""
