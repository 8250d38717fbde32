"""Engine `pruned`: posterior sums estimated from a sample of the windows, with their standard error."""
