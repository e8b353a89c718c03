"""The training benchmark: the losses of the LMF paper on the same splits, initial weights and batch orders.

Where a new one goes:

    loss       a row of LOSSES in losses.py; the fields of its options are --NAME-FIELD on the command line
    metric     a field of Metrics in metrics.py, and a row of METRICS if Table 1 shows it
    dataset    a file in data/readers, and a row of READERS
    network    a row of MODELS in models.py
    option     a field of Config in options.py
    command    a row of COMMANDS in cli.py
    study      a folder beside study/
"""
