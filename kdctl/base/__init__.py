"""What everything else may use: errors, keyed random numbers, progress."""
