"""The data: readers, splits, batches."""
