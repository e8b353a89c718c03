"""The paper's tables and figures from its datasets."""
