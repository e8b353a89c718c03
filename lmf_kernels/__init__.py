"""The LMF loss (alpha * LDAM + beta * focal, arXiv 2212.12741) as fused PyTorch kernels.

    criterion = LMFLoss(class_counts(labels, num_classes))
    loss = criterion(logits, target)

LDAM, focal loss and cross-entropy are special cases of the same kernels.
"""

from ._versions import __version__  # first: it refuses a torch that is too old
from .counts import class_counts
from .distributed import global_normalizer
from .functional import lmf_loss
from .linear.functional import linear_lmf_loss
from .linear.module import LinearLMFLoss
from .margins import effective_number_weights, inverse_frequency_weights, ldam_margins
from .modules import FocalLoss, LDAMLoss, LMFLoss
from .schedules import DeferredReweighting
from .sharded.shares import ClassShares

__all__ = [
    "ClassShares",
    "DeferredReweighting",
    "FocalLoss",
    "LDAMLoss",
    "LMFLoss",
    "LinearLMFLoss",
    "__version__",
    "class_counts",
    "effective_number_weights",
    "global_normalizer",
    "inverse_frequency_weights",
    "ldam_margins",
    "linear_lmf_loss",
    "lmf_loss",
]
