"""Classes spread over ranks: logits of which every rank holds the columns of its own classes."""
