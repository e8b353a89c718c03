"""ISIC-2019: dermatoscopic images of eight diagnoses."""

import numpy as np

from ...errors import UserError
from ..samples import Samples
from .files import data_folder, find_images, has_file, read_rows

CLASSES = ("NV", "MEL", "BCC", "BKL", "AK", "SCC", "VASC", "DF")  # from frequent to rare
COUNTS = (12875, 4522, 3323, 2624, 867, 628, 253, 239)  # as published; 25331 images
UNKNOWN = "UNK"  # a column without training images; a row that has it set is left out
METADATA = "ISIC_2019_Training_Metadata.csv"


def read_isic2019(argument: str) -> Samples:
    """ISIC_2019_Training_GroundTruth.csv (one-hot), the image folder, and the metadata for lesions if it is there."""
    root = data_folder("isic2019", argument)
    rows = read_rows(root, "ISIC_2019_Training_GroundTruth.csv", ["image", *CLASSES])
    labelled = [(row["image"], _diagnosis(row)) for row in rows]
    known = [(image, diagnosis) for image, diagnosis in labelled if diagnosis != UNKNOWN]
    images = [image for image, _ in known]
    groups = None
    if has_file(root, METADATA):
        lesions = {row["image"]: row["lesion_id"] for row in read_rows(root, METADATA, ["image", "lesion_id"])}
        # An image without a lesion_id is a lesion of its own.
        groups = np.unique([lesions.get(image) or image for image in images], return_inverse=True)[1]
    return Samples(
        name="ISIC-2019",
        class_names=CLASSES,
        labels=np.array([CLASSES.index(diagnosis) for _, diagnosis in known], dtype=np.int64),
        images=find_images(root, images),
        groups=groups,
        group_name="lesion",
        published_counts=COUNTS,
    )


def _diagnosis(row: dict[str, str]) -> str:
    chosen = [name for name in (*CLASSES, UNKNOWN) if row.get(name, "0") not in ("0", "0.0")]
    if len(chosen) != 1:
        raise UserError(
            f"ISIC_2019_Training_GroundTruth.csv: image {row['image']} has {len(chosen)} diagnoses, expected 1"
        )
    return chosen[0]
