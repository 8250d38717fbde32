"""Engine `pruned`: an estimate from a chosen part of the windows, with its standard error."""
