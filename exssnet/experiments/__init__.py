"""Experiments of the literature: recipes and their runs, baselines, statistics, reports and plots."""
