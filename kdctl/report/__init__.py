"""What run folders say: tables with error bars, comparisons, figures and verdicts."""
