"""The mathematics in eager PyTorch: `reference` derives it; `rows` and `slices` are its steps."""
