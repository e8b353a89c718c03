"""Where the model looks: Grad-CAM overlays of test samples, through the grad-cam package."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from .errors import UserError
from .losses import LABELS
from .models import MODELS, model_of
from .output import write_atomically


def check_gradcam(model_name: str) -> None:
    """Raise UserError if the package is missing or the model has no map of the image."""
    if model_of(model_name).map_layer is None:
        supported = ", ".join(name for name, model in MODELS.items() if model.map_layer)
        raise UserError(f"--grad-cam is not supported for {model_name}, expected one of: {supported}")
    try:
        import pytorch_grad_cam  # noqa: F401
    except ImportError as error:
        raise UserError("--grad-cam needs the package grad-cam: pip install grad-cam") from error


def overlays(model: nn.Module, model_name: str, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For (n, c, h, w) images in [0, 1]: overlays (n, h, w, 3) for the predicted classes, and these classes (n,)."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import show_cam_on_image

    model.eval()
    with GradCAM(model=model, target_layers=[model.get_submodule(model_of(model_name).map_layer)]) as cam:
        maps = cam(input_tensor=images, targets=None)  # (n, h, w) in [0, 1], for the predicted class
        predicted = cam.outputs.argmax(1).cpu().numpy()
    pictures = [
        show_cam_on_image(picture, heat, use_rgb=True) / 255 for picture, heat in zip(as_rgb(images), maps, strict=True)
    ]
    return np.stack(pictures), predicted


def save(folder: Path, loss: str, pictures: np.ndarray, predicted: np.ndarray) -> None:
    """Keep what overlays() gave for a finished training, so that --resume still has it."""
    write_atomically(_file(folder, loss), lambda file: np.savez(file, pictures=pictures, predicted=predicted))


def saved(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The kept overlays and predicted classes of each loss."""
    found = {loss: _file(folder, loss) for loss in LABELS if _file(folder, loss).exists()}
    return {loss: tuple(np.load(file)[name] for name in ("pictures", "predicted")) for loss, file in found.items()}


def discard(folder: Path) -> None:
    """Remove what an earlier run kept."""
    for loss in LABELS:
        _file(folder, loss).unlink(missing_ok=True)


def _file(folder: Path, loss: str) -> Path:
    return folder / "grad_cam" / f"{loss}.npz"


def as_rgb(images: torch.Tensor) -> np.ndarray:
    """(n, c, h, w) as (n, h, w, 3) float32."""
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy().astype(np.float32)
