"""timm: its model, data loader, optimiser, scheduler and meters in the shape of its training script (pip install timm).

python examples/timm_loop.py --epochs 12 --size 120
"""

import argparse

import torch
from digits import long_tailed_digits
from PIL import Image
from timm import create_model
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, random_seed
from torch import Tensor
from torch.utils.data import Dataset

from lmf_kernels import LMFLoss, class_counts


class Digits(Dataset):
    """PIL images, with the attribute `transform` that timm's loaders set."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = [Image.fromarray((image[0] * 255).byte().numpy()).convert("RGB") for image in images]
        self.targets = labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.targets[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--size", type=int, default=120, help="images of the most frequent class, at most 134")
    options = parser.parse_args()

    random_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, y, test_x, test_y = long_tailed_digits(options.size)
    common = dict(input_size=(3, 32, 32), use_prefetcher=False, num_workers=0, persistent_workers=False, device=device)
    train = create_loader(Digits(x, y), batch_size=32, is_training=True, no_aug=True, **common)
    test = create_loader(Digits(test_x, test_y), batch_size=100, crop_pct=1.0, **common)

    model = create_model("test_resnet", num_classes=10).to(device)
    criterion = LMFLoss(class_counts(y, num_classes=10), s=5).to(device)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=options.epochs)

    history = []
    for epoch in range(epochs):
        model.train()
        losses = AverageMeter()
        for images, labels in train:
            loss = criterion(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(labels))
        scheduler.step(epoch + 1)
        history.append(losses.avg)

    model.eval()
    with torch.inference_mode():
        top1 = sum(accuracy(model(images.to(device)), labels.to(device))[0] for images, labels in test) / len(test)
    print(f"loss {history[0]:.3f} -> {history[-1]:.3f}, balanced accuracy {top1 / 100:.3f}")


if __name__ == "__main__":
    main()
