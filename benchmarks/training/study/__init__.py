"""The study behind docs/choosing.md."""
