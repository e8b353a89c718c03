"""MONAI: 2-D segmentation of generated images, (N, C, H, W) logits and rare foreground classes (pip install monai).

python examples/monai_segmentation.py --epochs 15 --size 40
"""

import argparse

import numpy as np
import torch
from monai.data import ArrayDataset, DataLoader, create_test_image_2d
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.networks.utils import one_hot
from monai.utils import set_determinism

from lmf_kernels import LMFLoss, class_counts

CLASSES = 4


def images(count: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Discs of three classes on a background; (1, 64, 64) images and labels."""
    options = dict(num_objs=6, rad_max=10, noise_max=0.2, num_seg_classes=CLASSES - 1, channel_dim=0)
    random = np.random.RandomState(seed)
    pairs = [create_test_image_2d(64, 64, random_state=random, **options) for _ in range(count)]
    return [image for image, _ in pairs], [label.astype(np.int64) for _, label in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--size", type=int, default=40, help="training images")
    options = parser.parse_args()

    set_determinism(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = images(options.size, seed=1)
    test_x, test_y = images(10, seed=2)
    train = DataLoader(ArrayDataset(x, labels=y), batch_size=5, shuffle=True)
    test = DataLoader(ArrayDataset(test_x, labels=test_y), batch_size=5)

    model = UNet(2, 1, CLASSES, channels=(8, 16, 32), strides=(2, 2), num_res_units=1).to(device)
    counts = class_counts(np.concatenate(y), CLASSES)  # pixels of each class
    criterion = LMFLoss(counts, s=5).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    history = []
    for _ in range(options.epochs):
        losses = []
        for image, label in train:
            optimizer.zero_grad()
            loss = criterion(model(image.to(device)), label.to(device).squeeze(1))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        history.append(torch.stack(losses).mean().item())

    model.eval()
    dice = DiceMetric(include_background=False)
    with torch.no_grad():
        for image, label in test:
            prediction = model(image.to(device)).argmax(1, keepdim=True)
            dice(one_hot(prediction, CLASSES), one_hot(label.to(device), CLASSES))
    print(f"loss {history[0]:.3f} -> {history[-1]:.3f}, mean Dice {dice.aggregate().item():.3f}")


if __name__ == "__main__":
    main()
