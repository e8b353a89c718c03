"""The training benchmark's parts: data, models, losses, loop, report and plots."""
