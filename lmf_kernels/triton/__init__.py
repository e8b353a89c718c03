"""The Triton backend. Imported at its first call: importing Triton takes most of a second."""
