"""The small networks of this project, for data that need no large ones."""

import torch
from torch import nn


class SmallCNN(nn.Module):
    """Two 3x3 convolutions with pooling and two linear layers; for images from 4x4 on."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.pool = nn.AdaptiveAvgPool2d(2)  # 8x8 images arrive as 2x2
        self.hidden = nn.Sequential(nn.Linear(256, 64), nn.ReLU(inplace=True))
        self.classifier: nn.Module = nn.Linear(64, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, channels, h, w) to logits (N, C)."""
        return self.classifier(self.hidden(self.pool(self.features(images)).flatten(1)))


class MLP(nn.Module):
    """Two hidden layers for tables; batch normalisation standardises the features with training data alone."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.BatchNorm1d(features, affine=False),
            nn.Linear(features, 64),
            nn.ReLU(inplace=True),
            nn.Linear(64, 64),
            nn.ReLU(inplace=True),
        )
        self.classifier: nn.Module = nn.Linear(64, num_classes)

    def forward(self, table: torch.Tensor) -> torch.Tensor:
        """(N, ...) of ``features`` numbers to logits (N, C)."""
        return self.classifier(self.hidden(table.flatten(1)))


class CosineClassifier(nn.Module):
    """LDAM-DRW's normalised last layer: logits are cosines in [-1, 1], which LDAM multiplies by s."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, features))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, features) to (N, C)."""
        return nn.functional.linear(nn.functional.normalize(hidden, dim=1), nn.functional.normalize(self.weight, dim=1))
