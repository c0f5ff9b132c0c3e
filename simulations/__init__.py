"""Experiments: configuration files, engines that run the apps, results, plots and reports."""
