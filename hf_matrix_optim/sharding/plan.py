"""Which rank maps which matrix, and in which rounds: the same plan on every rank, without talking."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Most elements of a round on one owner; two rounds are under way at a time.
ROUND_ELEMENTS = 2**26

#: What a GPU maps a second (operations, float16), and what it can share with others on its host and on other hosts a
#: second (bytes): an H100's products in the kernels, half of NVLink's 450 GB/s, an InfiniBand port's 50.
GPU_OPERATIONS, HOST_BYTES, NETWORK_BYTES = 4e14, 2.25e11, 5e10
#: The map must take so many times the time of the messages: a round is a smaller stack, with messages at both ends.
LEAST_GAIN = 2.0


def sharing_pays(operations: float, elements: int, *, in_one_host: bool) -> bool:
    """Whether R GPUs with copies of a matrix should map it once and share the direction, instead of R times.

    That saves (R - 1) / R of the operations and sends (R - 1) / R of 2 bytes an element, so R does not matter. On two
    H200, Qwen2.5-1.5B under MUD, whose ratio is 0.9 to 1, was slower shared out; Qwen2.5-7B on four, at 2.1, faster.

    Args:
        operations: of the map, floating-point.
        elements: of the matrix.
        in_one_host: whether all R are.
    """
    link = HOST_BYTES if in_one_host else NETWORK_BYTES
    return operations / GPU_OPERATIONS > LEAST_GAIN * 2 * elements / link


@dataclass(frozen=True)
class MatrixJob:
    """A matrix to be mapped by one rank.

    Attributes:
        parameter: position of its parameter in the param group.
        piece: position of the matrix in the parameter.
        fans: (fan_out, fan_in).
        axis, extents: how it is cut, see ``MatrixPiece``.
        dtypes: of the parameter and its momentum; a stack has one of each.
    """

    parameter: int
    piece: int
    fans: tuple[int, int]
    axis: int | None
    extents: tuple[int, ...]
    dtypes: tuple[str, ...]

    @property
    def elements(self) -> int:
        return self.fans[0] * self.fans[1]

    @property
    def operations(self) -> float:
        """Of one Newton-Schulz iteration up to a factor: 4 k^2 d + 2 k^3, k the shorter side."""
        k, d = sorted(self.fans)
        return 4.0 * k * k * d + 2.0 * k**3


@dataclass(frozen=True)
class Round:
    """Equal matrices that go through gather, map and scatter together, ordered by their owner.

    Attributes:
        jobs: all of them, as they lie in this rank's stack.
        counts: ``counts[replica][shard]``, how many each owner maps.
    """

    jobs: tuple[MatrixJob, ...]
    counts: tuple[tuple[int, ...], ...]


def owners_of(jobs: Sequence[MatrixJob], owners: int) -> list[int]:
    """Owner of each job: the longest first, each to the rank with the least work (longest processing time)."""
    order = sorted(range(len(jobs)), key=lambda i: (-jobs[i].operations, i))
    load = [0.0] * owners
    chosen = [0] * len(jobs)
    for i in order:
        owner = min(range(owners), key=lambda rank: (load[rank], rank))
        chosen[i] = owner
        load[owner] += jobs[i].operations
    return chosen


def rounds_of(
    jobs: Sequence[MatrixJob], shards: int, replicas: int, most_of: Callable[[MatrixJob], int]
) -> list[Round]:
    """Rounds of equal matrices, as few as there can be and of equal size, to one.

    Args:
        jobs: in the same order on all ranks.
        shards, replicas: how many ranks there are.
        most_of: how many matrices like this an owner may have in a round, at least 1.
    """
    owner_of = dict(zip(range(len(jobs)), owners_of(jobs, shards * replicas), strict=True))
    by_shape: dict[tuple[object, ...], list[list[int]]] = defaultdict(lambda: [[] for _ in range(shards * replicas)])
    for i, job in enumerate(jobs):
        by_shape[job.fans, job.axis, job.extents, job.dtypes][owner_of[i]].append(i)
    rounds = []
    for owned in by_shape.values():
        longest = max(map(len, owned))
        count = -(-longest // most_of(jobs[next(i for each in owned for i in each)]))
        for number in range(count):
            taken = slice(longest * number // count, longest * (number + 1) // count)
            chunk = [each[taken] for each in owned]
            counts = [len(each) for each in chunk]
            rounds.append(
                Round(
                    tuple(jobs[i] for each in chunk for i in each),
                    tuple(tuple(counts[r * shards : (r + 1) * shards]) for r in range(replicas)),
                )
            )
    return rounds
