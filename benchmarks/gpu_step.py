"""A training step of ResNet-50 on a GPU, and the loss's share of it: batch 256, bfloat16 autocast, channels_last."""

from collections.abc import Callable
from functools import partial

import torch
from gpu_cases import Loss, Run, losses
from gpu_rows import one_line
from torch import nn

FIELDS = ("loss", "classes"), ("ms a step", "images/s", "loss ms", "share of the loss", "note")
CLASSES = (7, 1000)
STEPS = 10


def step(run: Run, batch: int = 256, side: int = 224) -> None:
    try:
        from torchvision.models import resnet50
    except (ImportError, RuntimeError) as error:  # missing, or built for another torch
        note = f"not run: torchvision cannot be imported ({one_line(error)})"
        run.rows.run(("-", "-"), lambda: {"note": note})
        return
    for classes in CLASSES:
        names = list(losses(classes, run.device))
        if run.rows.missing((who, classes) for who in names):
            for who, loss in losses(classes, run.device).items():
                measure = partial(_measure, run, lambda classes=classes: resnet50(num_classes=classes), loss)
                run.rows.run((who, classes), partial(measure, classes, batch, side))
            torch.cuda.empty_cache()


def _measure(
    run: Run, make: Callable[[], nn.Module], loss: Loss, classes: int, batch: int, side: int
) -> dict[str, object]:
    torch.manual_seed(0)
    device = run.device
    model = make().to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn((batch, 3, side, side), device=device).to(memory_format=torch.channels_last)
    target = torch.randint(0, classes, (batch,), device=device)

    def train() -> tuple[torch.cuda.Event, ...]:
        marks = tuple(torch.cuda.Event(enable_timing=True) for _ in range(4))
        optimizer.zero_grad(set_to_none=True)
        marks[0].record()
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(images)
        # Cut here, so that the loss's backward ends before the model's begins and both can be timed.
        leaf = logits.detach().requires_grad_()
        marks[1].record()
        with torch.autocast(device.type, torch.bfloat16):
            result = loss(leaf, target)
        result.backward()
        marks[2].record()
        logits.backward(leaf.grad)
        optimizer.step()
        marks[3].record()
        return marks

    def milliseconds(steps: int) -> tuple[float, float]:
        """Of a step and of its loss."""
        marks = [train() for _ in range(steps)]
        torch.cuda.synchronize(device)
        whole = marks[0][0].elapsed_time(marks[-1][3]) / steps
        return whole, sum(each[1].elapsed_time(each[2]) for each in marks) / steps

    milliseconds(3)
    whole, of_loss = milliseconds(STEPS)
    images_a_second = 1e3 * batch / whole
    return {
        "ms a step": whole, "images/s": images_a_second, "loss ms": of_loss, "share of the loss": of_loss / whole,
    }  # fmt: skip
