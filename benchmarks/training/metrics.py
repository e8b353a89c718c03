"""The paper's metrics, from scikit-learn, and what they are measured on."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from .ranks import Ranks

METRICS = {"accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "macro_f1": "Macro F1"}  # Table 1


@dataclass(frozen=True)
class Metrics:
    """Accuracy, and the unweighted means over classes of precision, recall and F1."""

    accuracy: float
    precision: float
    recall: float
    macro_f1: float
    per_class_f1: list[float]
    confusion: list[list[int]]  # rows: true class, columns: predicted class


def measure(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> Metrics:
    """The metrics of predictions (n,); a class that is never predicted has precision and F1 of 0."""
    classes = np.arange(num_classes)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predictions, labels=classes, average=None, zero_division=0
    )
    return Metrics(
        accuracy=float(accuracy_score(labels, predictions)),
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        macro_f1=float(f1.mean()),
        per_class_f1=f1.tolist(),
        confusion=confusion_matrix(labels, predictions, labels=classes).tolist(),
    )


class Tally:
    """What a pass over one part of the data adds up to, over all processes."""

    def __init__(self, num_classes: int, device: torch.device, ranks: Ranks) -> None:
        self.num_classes = num_classes
        self.ranks = ranks
        self.loss = torch.zeros((), device=device)  # the sum over samples
        self.samples = 0
        # (label, prediction) of the samples; never empty, since a process may get no share.
        self.pairs = [torch.empty(2, 0, dtype=torch.int64, device=device)]

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """A batch: its mean loss, logits (n, C) and labels (n,)."""
        self.loss += loss.detach() * len(labels)
        self.samples += len(labels)
        self.pairs.append(torch.stack([labels, logits.argmax(1)]))

    def mean_loss(self) -> tuple[float, int]:
        """The mean loss and the number of samples; waits for the device."""
        sums = torch.tensor([self.loss.item(), self.samples], dtype=torch.float64, device=self.loss.device)
        total, samples = self.ranks.sum(sums).tolist()
        return total / samples, int(samples)

    def metrics(self) -> Metrics:
        """The metrics of all samples."""
        labels, predictions = self.ranks.gather(torch.cat(self.pairs, dim=1)).cpu().numpy()
        return measure(labels, predictions, self.num_classes)
