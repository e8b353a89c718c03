"""ODIR-5K: fundus photographs of both eyes of about 3,500 patients, eight diagnoses."""

import ast

import numpy as np

from ...errors import UserError
from ..samples import Samples
from .files import data_folder, find_images, read_rows

# Normal, diabetes, other, cataract, glaucoma, age-related macular degeneration, myopia, hypertension.
CLASSES = ("N", "D", "O", "C", "G", "A", "M", "H")  # from frequent to rare
COUNTS = (2873, 1608, 708, 293, 284, 266, 232, 128)  # as published; 6392 images


def read_odir5k(argument: str) -> Samples:
    """full_df.csv (one row per eye: ID, filename, labels such as "['N']") and the images."""
    root = data_folder("odir5k", argument)
    rows = read_rows(root, "full_df.csv", ["ID", "labels", "filename"])
    return Samples(
        name="ODIR-5K",
        class_names=CLASSES,
        labels=np.array([CLASSES.index(_diagnosis(row)) for row in rows], dtype=np.int64),
        images=find_images(root, [row["filename"].rpartition(".")[0] for row in rows]),
        groups=np.unique([row["ID"] for row in rows], return_inverse=True)[1],
        group_name="patient",
        published_counts=COUNTS,
    )


def _diagnosis(row: dict[str, str]) -> str:
    try:
        (diagnosis,) = ast.literal_eval(row["labels"])
    except (ValueError, SyntaxError, TypeError):
        diagnosis = None
    if diagnosis not in CLASSES:
        raise UserError(
            f"full_df.csv: {row['filename']} has the labels {row['labels']!r}, "
            f"expected a list of one of {', '.join(CLASSES)}"
        )
    return diagnosis
