"""All pairs of factor values in few cases: every two values of different factors meet in at least one case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Case = dict[str, Any]


def pairwise(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """Return cases that cover every pair of values, greedily and always the same.

    Args:
        factors: name -> hashable values.
        allowed: says whether a case, complete or partial, may be run; a pair it refuses is not covered.
    """
    cases: list[Case] = []
    left = {  # a dict keeps its order, unlike a set
        frozenset({(p, v), (q, w)}): None
        for p, q in combinations(factors, 2)
        for v, w in product(factors[p], factors[q])
        if allowed({p: v, q: w})
    }
    while left:
        case: Case = dict(next(iter(left)))
        for name, values in factors.items():
            if name in case:
                continue
            turn = len(cases) % len(values)  # ties go round
            possible = [v for v in (*values[turn:], *values[:turn]) if allowed({**case, name: v})]
            gains = [sum(frozenset({(name, v), item}) in left for item in case.items()) for v in possible]
            case[name] = possible[gains.index(max(gains))]
        for pair in combinations(case.items(), 2):
            left.pop(frozenset(pair), None)
        cases.append({name: case[name] for name in factors})
    return cases


def pairs(**factors: Sequence[Any]) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over the pairwise cases of factors, instead of their full product."""
    return pytest.mark.parametrize(tuple(factors), [tuple(case.values()) for case in pairwise(factors)])
