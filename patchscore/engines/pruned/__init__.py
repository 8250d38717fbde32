"""Engine `pruned`: posterior sums from a sample of the windows, with the error that leaves."""
