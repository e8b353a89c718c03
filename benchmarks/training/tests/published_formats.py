"""Small datasets in the file names, columns and folder layouts of the published ones."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

HAM_COLUMNS = ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"]
ISIC_COLUMNS = ["image", "MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]
ODIR_COLUMNS = [
    *["ID", "Patient Age", "Patient Sex", "Left-Fundus", "Right-Fundus"],
    *["Left-Diagnostic Keywords", "Right-Diagnostic Keywords"],
    *["N", "D", "G", "C", "A", "H", "M", "O", "filepath", "labels", "target", "filename"],
]


def write_csv(path: Path, columns: list[str], rows: list[list[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def write_images(folder: Path, names: list[str], labels: list[str] | None = None) -> None:
    """A picture for each name, a spot whose colour and place tell the label."""
    folder.mkdir(parents=True, exist_ok=True)
    order = sorted(set(labels or names))
    for name, label in zip(names, labels or names, strict=True):
        kind = order.index(label) + 1
        y, x = np.mgrid[:48, :64]
        spot = np.exp(-((y - 6 * (kind % 4) - 14) ** 2 + (x - 6 * kind - 8) ** 2) / 90)[..., None]
        skin, colour = np.array([215, 175, 155]), np.array([kind * 67 % 160, kind * 31 % 120, kind * 101 % 140])
        Image.fromarray((skin * (1 - spot) + colour * spot).astype(np.uint8)).save(folder / name)


def make_ham10000(root: Path, diagnoses: list[str], folders: list[str]) -> None:
    rows = [[f"HAM_{i // 2:07}", f"ISIC_{i:07}", dx, "histo", 50.0, "male", "back"] for i, dx in enumerate(diagnoses)]
    root.mkdir(parents=True, exist_ok=True)
    write_csv(root / "HAM10000_metadata.csv", HAM_COLUMNS, rows)
    for part, folder in enumerate(folders):
        own = range(part, len(rows), len(folders))
        write_images(root / folder, [f"{rows[i][1]}.jpg" for i in own], [diagnoses[i] for i in own])


def make_isic2019(root: Path, diagnoses: list[str]) -> list[str]:
    names = [f"ISIC_{i:07}" + ("_downsampled" if i % 2 else "") for i in range(len(diagnoses))]
    rows = [
        [name, *(f"{float(column == dx)}" for column in ISIC_COLUMNS[1:])]
        for name, dx in zip(names, diagnoses, strict=True)
    ]
    root.mkdir(parents=True, exist_ok=True)
    write_csv(root / "ISIC_2019_Training_GroundTruth.csv", ISIC_COLUMNS, rows)
    write_images(root / "ISIC_2019_Training_Input", [f"{name}.jpg" for name in names], diagnoses)
    return names


def odir_row(patient: int, side: str, labels: str) -> list[object]:
    name = f"{patient}_{side}.jpg"
    fundus = [f"{patient}_left.jpg", f"{patient}_right.jpg"]
    return [patient, 57, "Male", *fundus, "cataract", "normal", *[0] * 8, f"../x/{name}", labels, "[1, 0]", name]


def make_odir5k(root: Path, diagnoses: list[str]) -> None:
    rows = [odir_row(i // 2, ("left", "right")[i % 2], f"['{name}']") for i, name in enumerate(diagnoses)]
    root.mkdir(parents=True, exist_ok=True)
    write_csv(root / "full_df.csv", ODIR_COLUMNS, rows)
    write_images(root / "preprocessed_images", [str(row[-1]) for row in rows], diagnoses)
