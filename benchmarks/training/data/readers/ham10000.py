"""HAM10000: dermatoscopic images of seven diagnoses (Tschandl et al. 2018)."""

import numpy as np

from ...errors import UserError
from ..samples import Samples
from .files import data_folder, find_images, read_rows

CLASSES = ("nv", "mel", "bkl", "bcc", "akiec", "vasc", "df")  # in the paper's order: from frequent to rare
COUNTS = (6705, 1113, 1099, 514, 327, 142, 115)  # as published; 10015 images


def read_ham10000(argument: str) -> Samples:
    """HAM10000_metadata.csv and the images in one or two part folders, as published."""
    root = data_folder("ham10000", argument)
    rows = read_rows(root, "HAM10000_metadata.csv", ["lesion_id", "image_id", "dx"])
    for row in rows:
        if row["dx"] not in CLASSES:
            raise UserError(
                f"HAM10000_metadata.csv: image {row['image_id']} has the unknown dx {row['dx']!r}, "
                f"expected one of {', '.join(CLASSES)}"
            )
    return Samples(
        name="HAM10000",
        class_names=tuple(name.upper() for name in CLASSES),
        labels=np.array([CLASSES.index(row["dx"]) for row in rows], dtype=np.int64),
        images=find_images(root, [row["image_id"] for row in rows]),
        groups=np.unique([row["lesion_id"] for row in rows], return_inverse=True)[1],
        group_name="lesion",
        published_counts=COUNTS,
    )
