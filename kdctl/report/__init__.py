"""What a study says: tables with error bars, comparisons and verdicts."""
