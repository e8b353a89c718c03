"""A linear classifier and its loss together, without the logits in memory."""
