"""Tables, figures and pages from aggregated results. Nothing here computes a statistic."""
