"""Tests of the training benchmark; `make test` collects them."""
