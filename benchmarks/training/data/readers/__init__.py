"""Readers: from ``--data NAME`` or ``--data NAME:PATH`` to Samples."""

from collections.abc import Callable

from ...errors import UserError
from ..samples import Samples
from .digits import read_digits
from .ham10000 import read_ham10000
from .imagefolder import read_imagefolder
from .isic2019 import read_isic2019
from .keel import read_keel
from .medmnist import read_medmnist
from .odir5k import read_odir5k

READERS: dict[str, tuple[Callable[[str], Samples], str]] = {  # what reads the data, and how they are named
    "digits": (read_digits, "digits, digits:RATIO"),
    "imagefolder": (read_imagefolder, "imagefolder:PATH"),
    "ham10000": (read_ham10000, "ham10000:PATH"),
    "isic2019": (read_isic2019, "isic2019:PATH"),
    "odir5k": (read_odir5k, "odir5k:PATH"),
    "medmnist": (read_medmnist, "medmnist:NAME, medmnist:PATH.npz"),
    "keel": (read_keel, "keel:NAME, keel:PATH.dat"),
}
FORMS = ", ".join(forms for _, forms in READERS.values())


def read(spec: str) -> Samples:
    """Read the dataset that ``spec`` names."""
    name, _, argument = spec.partition(":")
    if name not in READERS:
        raise UserError(f"--data {spec!r} is unknown, expected one of: {FORMS}")
    reader, _ = READERS[name]
    return reader(argument)
