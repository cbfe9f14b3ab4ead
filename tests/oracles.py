"""The papers' equations typed line by line in float64, one matrix at a time; slow and plain on purpose.

Each class holds one matrix W (m, n) in float64 and its state; ``step(G)`` is one update. Nothing here is shared with
the package.
"""

import math

import torch
from torch import Tensor


def newton_schulz_5(G: Tensor, steps: list[tuple[float, float, float]]) -> Tensor:
    """K. Jordan's iteration, on the transpose if tall."""
    X = G / torch.sqrt(torch.sum(G * G)) if bool((G != 0).any()) else G.clone()
    if G.shape[0] > G.shape[1]:
        X = X.T
    for a, b, c in steps:
        A = X @ X.T
        X = a * X + b * (A @ X) + c * (A @ A @ X)
    return X.T if G.shape[0] > G.shape[1] else X


JORDAN = [(3.4445, -4.7750, 2.0315)] * 5


class MuonOracle:
    """Muon with Nesterov momentum and Moonlight's scale (or Jordan's)."""

    def __init__(self, W: Tensor, lr: float, decay: float, beta: float, nesterov: bool = True, scale: str = "rms"):
        self.W, self.lr, self.decay, self.beta, self.nesterov, self.scale = W.clone(), lr, decay, beta, nesterov, scale
        self.M = torch.zeros_like(W)

    def step(self, G: Tensor) -> None:
        m, n = self.W.shape
        self.M = self.beta * self.M + G
        U = G + self.beta * self.M if self.nesterov else self.M
        O = newton_schulz_5(U, JORDAN)  # noqa: E741
        s = 0.2 * math.sqrt(max(m, n)) if self.scale == "rms" else math.sqrt(max(1, m / n))
        self.W = self.W - self.lr * (s * O + self.decay * self.W)


class AdaMuonOracle:
    """AdaMuon, second version: sign, one beta, no bias correction, Frobenius rescaling."""

    def __init__(self, W: Tensor, lr: float, decay: float, beta: float, nesterov: bool = False, eps: float = 1e-8):
        self.W, self.lr, self.decay, self.beta, self.nesterov, self.eps = W.clone(), lr, decay, beta, nesterov, eps
        self.M = torch.zeros_like(W)
        self.V = torch.zeros_like(W)

    def step(self, G: Tensor) -> None:
        m, n = self.W.shape
        self.M = self.beta * self.M + G
        O = newton_schulz_5(  # noqa: E741
            torch.sign(G + self.beta * self.M if self.nesterov else self.M), JORDAN
        )
        self.V = self.beta * self.V + (1 - self.beta) * O * O
        O_hat = O / (torch.sqrt(self.V) + self.eps)
        gamma = 0.2 * math.sqrt(m * n) / torch.sqrt(torch.sum(O_hat * O_hat))
        self.W = self.W - self.lr * (gamma * O_hat + self.decay * self.W)


class AdaMuonV1Oracle:
    """AdaMuon, first version: average momentum, no sign, its own bias-corrected second moment."""

    def __init__(self, W: Tensor, lr: float, decay: float, beta: float, beta2: float = 0.999, eps: float = 1e-8):
        self.W, self.lr, self.decay, self.beta, self.beta2, self.eps = W.clone(), lr, decay, beta, beta2, eps
        self.M = torch.zeros_like(W)
        self.V = torch.zeros_like(W)
        self.t = 0

    def step(self, G: Tensor) -> None:
        self.t += 1
        self.M = self.beta * self.M + (1 - self.beta) * G
        O = newton_schulz_5(self.M, JORDAN)  # noqa: E741
        self.V = self.beta2 * self.V + (1 - self.beta2) * O * O
        V_hat = self.V / (1 - self.beta2**self.t)
        O_hat = O / (torch.sqrt(V_hat) + self.eps)
        gamma = 0.2 / (torch.sqrt(torch.mean(O_hat * O_hat)) + self.eps)
        self.W = self.W - self.lr * (gamma * O_hat + self.decay * self.W)


def mud_map(Q: Tensor, passes: int) -> Tensor:
    """MUD's map by its definition, row by row, on the transpose if tall; the solve is forward substitution."""
    tall = Q.shape[0] > Q.shape[1]
    Q = Q.T.clone() if tall else Q.clone()
    k = Q.shape[0]
    for _ in range(passes):
        for i in range(k):
            Q[i] = Q[i] / math.sqrt(float(torch.sum(Q[i] * Q[i])))
        gram = Q @ Q.T
        solved = torch.zeros_like(Q)
        for i in range(k):
            solved[i] = Q[i]
            for j in range(i):
                solved[i] = solved[i] - gram[i, j] * solved[j]
        Q = solved
    for i in range(k):
        Q[i] = Q[i] / math.sqrt(float(torch.sum(Q[i] * Q[i])))
    return Q.T if tall else Q


class MUDOracle:
    """MUD with Nesterov momentum and p passes."""

    def __init__(self, W: Tensor, lr: float, decay: float, beta: float, passes: int = 1, nesterov: bool = True):
        self.W, self.lr, self.decay, self.beta, self.passes, self.nesterov = (
            W.clone(),
            lr,
            decay,
            beta,
            passes,
            nesterov,
        )
        self.M = torch.zeros_like(W)

    def step(self, G: Tensor) -> None:
        m, n = self.W.shape
        self.M = self.beta * self.M + G
        Q = mud_map(G + self.beta * self.M if self.nesterov else self.M, self.passes)
        s = 0.2 * math.sqrt(max(m, n))
        self.W = self.W - self.lr * (s * Q + self.decay * self.W)
