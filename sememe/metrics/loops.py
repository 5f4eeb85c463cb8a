"""Compiled loops of the metrics. Knows arrays."""

from __future__ import annotations

import heapq

import numpy as np
from jaxtyping import Float64, Int64
from numba import njit

__all__ = ["cheapest_assignment"]


@njit(cache=True)  # type: ignore[untyped-decorator]
def cheapest_assignment(
    indptr: Int64[np.ndarray, " n_rows_and_1"],
    indices: Int64[np.ndarray, " pairs"],
    costs: Float64[np.ndarray, " pairs"],
    n_columns: int,
    alone_cost: float,
) -> tuple[Int64[np.ndarray, " n_rows"], Float64[np.ndarray, " n_rows"], Float64[np.ndarray, " n_columns"]]:
    """The cheapest assignment over candidate pairs (-1: a row stays alone, for alone_cost), and all prices.

    Shortest augmenting paths (Jonker & Volgenant 1987; Crouse 2016 for unequal numbers), Dijkstra with a heap.
    """
    n_rows = indptr.size - 1
    u, v = np.zeros(n_rows), np.zeros(n_columns)
    column_of = np.full(n_rows, -1, np.int64)
    row_of = np.full(n_columns, -1, np.int64)
    for one in range(n_rows):  # every row's cheapest pair, where nobody has taken it
        best, at = alone_cost, np.int64(-1)
        for place in range(indptr[one], indptr[one + 1]):
            if costs[place] < best:
                best, at = costs[place], indices[place]
        u[one] = best
        if at >= 0 and row_of[at] < 0:
            column_of[one], row_of[at] = at, one
    distance = np.full(n_columns, np.inf)
    came_from = np.full(n_columns, -1, np.int64)
    done = np.zeros(n_columns, np.bool_)
    for start in range(n_rows):
        if column_of[start] >= 0:
            continue
        touched = [np.int64(0) for _ in range(0)]
        settled = [np.int64(0) for _ in range(0)]
        heap = [(0.0, np.int64(0)) for _ in range(0)]
        row, alone_row, sink = np.int64(start), np.int64(-1), np.int64(-1)
        so_far, alone = 0.0, np.inf
        while True:
            if so_far + alone_cost - u[row] < alone:
                alone, alone_row = so_far + alone_cost - u[row], row
            for place in range(indptr[row], indptr[row + 1]):
                column = indices[place]
                if done[column]:
                    continue
                length = so_far + costs[place] - u[row] - v[column]
                if length < distance[column]:
                    if distance[column] == np.inf:
                        touched.append(column)
                    distance[column], came_from[column] = length, row
                    heapq.heappush(heap, (length, column))
            column = np.int64(-1)
            while len(heap) > 0:
                length, candidate = heapq.heappop(heap)
                if not done[candidate] and length == distance[candidate]:
                    column = candidate
                    break
            if column < 0 or distance[column] >= alone:
                so_far = alone
                break
            so_far = distance[column]
            done[column] = True
            if row_of[column] < 0:
                sink = column
                break
            settled.append(column)
            row = row_of[column]
        u[start] += so_far
        for column in settled:
            u[row_of[column]] += so_far - distance[column]
            v[column] -= so_far - distance[column]
        for column in touched:
            done[column], distance[column] = False, np.inf
        # Hand the columns along the path over, from its end to its start.
        if sink < 0:
            row = alone_row
            freed = column_of[row]
            column_of[row] = -1
            if row == start:
                continue
            sink = freed
        while True:
            row = came_from[sink]
            row_of[sink] = row
            handed, column_of[row] = column_of[row], sink
            if row == start:
                break
            sink = handed
    return column_of, u, v
