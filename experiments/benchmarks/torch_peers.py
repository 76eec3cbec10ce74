"""The peers' calls and their timing, in PyTorch; never imported by a process that
computes with JAX."""

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.benchmarks.shapes import Shape
from experiments.benchmarks.timing import attempt, time_calls


def fla(shape: Shape) -> tuple[Callable, tuple]:
    """flash-linear-attention's chunked op and its inputs.

    As in its own layers, gates have the dtype of q, and GSA's write strength is an input.
    """
    tokens = (shape.B, shape.T, shape.H)
    q, k, v = (torch.randn(*tokens, size, device="cuda") for size in (shape.K, shape.K, shape.V))
    log_decay = torch.nn.functional.logsigmoid(torch.randn(*tokens, shape.gates, device="cuda")) / 16
    inputs = _leaves(q, k, v, log_decay, *[-torch.expm1(log_decay)] * (shape.op == "gsa"))
    return functools.partial(_chunked, shape.op, *inputs), inputs


def _chunked(op: str, q, k, v, log_decay, write=None, *, scale: float = 1.0) -> torch.Tensor:
    """The output of fla's op, its arguments in the order of ours."""
    from fla.ops.gla import chunk_gla
    from fla.ops.gsa import chunk_gsa

    if op == "gla":
        return chunk_gla(q, k, v, log_decay, scale=scale)[0]
    return chunk_gsa(q, k, v, write, log_decay, scale=scale)[0]


def results(op: str, scale: float, given: list[list[np.ndarray]]) -> list[dict[str, Any]]:
    """fla's {"arrays": [output, then the inputs' gradients]} for each [output's gradient, *inputs], which are float32
    and rounded to bfloat16, or what went wrong.

    Of its tile sizes Triton compiles one only: which it is makes no difference to rounding. It takes one of four warps,
    as with a single one some kernels spill so much that they compile for minutes.
    """
    from triton.runtime.autotuner import Autotuner

    fitting = Autotuner.prune_configs
    Autotuner.prune_configs = lambda self, arguments: [
        min(fitting(self, arguments), key=lambda config: abs(config.num_warps - 4))
    ]

    def run(arrays):
        cotangent, *inputs = _leaves(*(torch.from_numpy(x).cuda() for x in arrays))
        out = _chunked(op, *inputs, scale=scale)
        gradients = torch.autograd.grad(out, inputs, cotangent)
        return {"arrays": [x.detach().float().cpu().numpy() for x in (out, *gradients)]}

    return [attempt(functools.partial(run, arrays), Exception) for arrays in given]


def softmax_attention(backend: SDPBackend, shape: Shape) -> tuple[Callable, tuple]:
    """PyTorch's causal attention by one of its backends, and its inputs [B, H, T, D]."""
    B, T, H, D = shape.attention
    inputs = _leaves(*(torch.randn(B, H, T, D, device="cuda") for _ in range(3)))

    def call():
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)

    return call, inputs


PEERS = {
    "fla": fla,
    "torch flash": functools.partial(softmax_attention, SDPBackend.FLASH_ATTENTION),
    "torch cudnn": functools.partial(softmax_attention, SDPBackend.CUDNN_ATTENTION),
}


def measure(peer: str, shape: Shape, *, repeats: int, seconds: float) -> dict[str, Any]:
    """Milliseconds and temporary memory, forward and with the gradients of all inputs, or what went wrong."""

    def forward(call, inputs, cotangent):
        with torch.no_grad():
            return (call(),)

    def forward_backward(call, inputs, cotangent):
        out = call()
        return out, *torch.autograd.grad(out, inputs, cotangent)

    def measure_pass(run):
        call, inputs = PEERS[peer](shape)
        cotangent = torch.randn_like(call())
        return _measure_call(lambda: run(call, inputs, cotangent), repeats, seconds)

    passes = {"forward": forward, "forward_backward": forward_backward}
    return {name: attempt(lambda run=run: measure_pass(run), Exception) for name, run in passes.items()}


def _measure_call(call: Callable[[], tuple], repeats: int, seconds: float) -> dict[str, float]:
    """Milliseconds of a call, and the peak of its memory beyond inputs and outputs in MiB."""
    milliseconds = 1000 * time_calls(call, lambda _: torch.cuda.synchronize(), repeats=repeats, seconds=seconds)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = sum(x.nbytes for x in call())
    return {"ms": milliseconds, "temp_mib": (torch.cuda.max_memory_allocated() - before - outputs) / 2**20}


def compile_kernels(shape: Shape) -> None:
    """Runs fla's op once, forward and backward; the tile sizes that win beside other processes are not kept."""
    os.environ.setdefault("FLA_CACHE_RESULTS", "0")
    call, inputs = fla(shape)
    call().sum().backward(inputs=list(inputs))


def _leaves(*arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.to(torch.bfloat16).requires_grad_() for x in arrays)
