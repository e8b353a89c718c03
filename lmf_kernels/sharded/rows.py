"""Whole rows from every rank's share of their classes: at most one max and one sum over the group."""

import torch
from torch import Tensor

from .._call import Options, Tables
from ..math.rows import Labels, RowTables, read_labels
from ..math.slices import finish, relative_to
from .shares import ClassShares, explained


def finish_share(
    shares: ClassShares,
    sums: Tensor,  # (4, rows) over this rank's classes
    target: Tensor,
    tables: Tables,  # whole (C,), or this rank's share
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, saved, denominators) of whole rows, the same on every rank."""
    labels = read_labels(target, shares.total, options.ignore_index)
    rows, partial = _look_up(shares, target, labels, tables, sums.dtype)
    if len(shares.sizes) > 1:
        import torch.distributed as dist

        m = sums[0].clone()
        with explained("the max-reduction of the rows' largest logits", shares.group):
            dist.all_reduce(m, dist.ReduceOp.MAX, group=shares.group)
        shared = [table.reshape(-1) for table in (rows[name] for name in partial) if table is not None]
        packed = torch.stack((*relative_to(m, sums, options), *shared))
        with explained("the sum-reduction of the rows' sums", shares.group):
            dist.all_reduce(packed, dist.ReduceOp.SUM, group=shares.group)
        t1, t2, z_y, *joined = packed
        sums = torch.stack((m, t1, t2, z_y))
        rows |= {name: table.view(target.shape) for name, table in zip(partial, joined, strict=True)}
    return finish(sums, labels, RowTables(**rows), tables, options)


def _look_up(
    shares: ClassShares, target: Tensor, labels: Labels, tables: Tables, acc: torch.dtype
) -> tuple[dict[str, Tensor | None], list[str]]:
    """The rows' entries of each table by its name in RowTables, and which of them ranks have to add up.

    Those are the tables of which ranks hold a share; their entries are 0 where another rank holds the class.
    """
    by_class = tables.margins, tables.ldam_weight, tables.focal_weight
    found: dict[str, Tensor | None] = {}
    partial = []
    for name, table in zip(RowTables._fields, by_class, strict=True):
        if table is None:
            found[name] = None
        elif len(table) == shares.total:
            found[name] = table.to(acc)[labels.y]
        elif len(table) == 0:
            found[name] = torch.zeros(target.shape, dtype=acc, device=target.device)
            partial.append(name)
        else:
            y = target - shares.first
            here = labels.valid & (y >= 0) & (y < len(table))
            found[name] = torch.where(here, table.to(acc)[torch.where(here, y, 0)], 0.0)
            partial.append(name)
    return found, partial
