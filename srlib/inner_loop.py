"""The inner loop, fast: one generator, whose weights do not change meanwhile, evaluated K times.

    score(e) = -e + J(e)' m * (x - g(e)) / sigma^2                                                 Eq. (9)

What is the same in all K steps is done once, on a copy of the generator without trainable weights:

    - a transposed convolution of stride 1 becomes a convolution, and one of stride 2 to few channels a convolution whose
      outputs are dealt out to the pixels (Shi et al. 2016);
    - a large convolution becomes one small matrix product for each frequency (`FourierConvolution`) where that saves enough
      and the processor is as fast at products as at convolutions, in float32 or in bfloat16;
    - the weights of all others are put into the order that processors like best (channels last).

Each is the same function with the same derivative, to rounding. bfloat16, compiling and, on a GPU, a CUDA graph come on top.
"""

from __future__ import annotations

import copy
import logging
import math
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .generators import Generator
from .posterior import Posterior

Precision = Literal["full", "bfloat16"]

log = logging.getLogger(__name__)


def _processor() -> str:
    """What the system tells of the processor: its maker and, on Linux, its instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.exists() else platform.processor()


def _worth(processor: str) -> tuple[float, float]:
    """Frequencies take the place of a convolution with at least so many times their multiplications: in float32, in bfloat16.

    With fewer, the memory that they go through costs what they save (benchmarks/bench.py). On AMD's processors torch's float32
    matrix products run at half the speed of its convolutions, its products in bfloat16 do not; with AMX frequencies
    gain nothing in bfloat16.
    """
    return math.inf if "AuthenticAMD" in processor else 3.0, math.inf if "amx_bf16" in processor else 3.0


PROCESSOR = _processor()
WORTH, WORTH_IN_BFLOAT16 = _worth(PROCESSOR)
# So few outputs of a transposed convolution leave most of a processor's vector registers empty.
FEW_CHANNELS = 8


def accelerated(posterior: Posterior, precision: Precision = "full", compile: bool = False) -> Posterior:
    """The same posterior with a generator made for many evaluations: a copy, with the weights as they are now.

    precision : "full" computes in the generator's own type. "bfloat16" multiplies with 8 significant bits and adds up in
        float32 (torch.autocast); for processors and GPUs that are made for it.
    compile : let torch.compile fuse what stands between the products. It takes a compiler and, the first time, about a minute.

    Its scores cannot be differentiated again. What this machine or generator does not allow is left out, with the reason in
    the log. Raises ValueError for an unknown precision.
    """
    check_fast(precision, compile)
    if precision == "bfloat16" and not posterior.x.is_cuda and "\nflags" in PROCESSOR and "bf16" not in PROCESSOR:
        _tell_once(
            "bfloat16 is imitated on this processor, which has no instructions for it: precision='full' is faster"
        )
    fast = copy.copy(posterior)
    fast.generator = _frozen_copy(posterior.generator, precision)
    if compile:
        _compile(fast.generator)
    elif posterior.x.is_cuda:
        fast.__class__ = _OnGraph
    return fast


@lru_cache
def _tell_once(message: str) -> None:
    log.warning(message)


def check_fast(precision: Precision, compile: bool) -> None:
    """Raises ValueError unless the two are what `accelerated` takes."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r} must be one of {', '.join(get_args(Precision))}")
    if not isinstance(compile, bool):
        raise ValueError(f"compile={compile!r} must be True or False")


def _frozen_copy(generator: Generator, precision: Precision) -> Generator:
    frozen = copy.deepcopy(generator).requires_grad_(False)
    like = _latents_like(frozen, 1)
    rounded = precision == "bfloat16" and like.dtype == torch.float32
    worth = math.inf if like.is_cuda else WORTH if precision == "full" else WORTH_IN_BFLOAT16
    spectra: dict[tuple[int, int, int], Spectrum] = {}
    for name, side in _convolutions(frozen).items():
        path, own_name = name.rpartition(".")[::2]
        parent = frozen.get_submodule(path)
        if rounded and not like.is_cuda:
            _flatten_last(parent, side)
        conv = _as_convolution(getattr(parent, own_name))
        if _saving(conv, side) >= worth:
            shape = side, conv.kernel_size[0], conv.padding[0]
            conv = FourierConvolution(conv, spectra.setdefault(shape, Spectrum(*shape)))
            if rounded:
                conv = conv.to(torch.bfloat16)  # once: autocast would do it in each step
        setattr(parent, own_name, conv.to(memory_format=torch.channels_last))
    return _Autocast(frozen) if precision == "bfloat16" else frozen


class _Autocast(Generator):
    """A generator whose products are computed in bfloat16."""

    def __init__(self, generator: Generator) -> None:
        super().__init__(generator.latent_dims, generator.image_shape)
        self.generator = generator

    def forward(self, e: Tensor) -> Tensor:
        with torch.autocast(e.device.type, torch.bfloat16):
            return self.generator(e).to(e.dtype)


def _compile(generator: Generator) -> None:
    generator.compile()
    try:
        generator(_latents_like(generator, 2).requires_grad_())
    except Exception as reason:  # whatever a compiler that is absent, old or broken may raise
        log.warning("compile=True is left out: %s", reason)
        generator._compiled_call_impl = None


class _OnGraph(Posterior):
    """On a GPU the second score is recorded as a CUDA graph, which all further ones replay: one launch in place of hundreds."""

    _graph: torch.cuda.CUDAGraph | None = None
    _calls = 0

    def score(self, e: Tensor, create_graph: bool = False, chunk_size: int | None = None) -> Tensor:
        if create_graph or chunk_size is not None or self._calls < 1:
            self._calls += 1
            return super().score(e, create_graph, chunk_size)
        if self._graph is None and self._calls == 1:
            self._record(e)
        if self._graph is None:
            return super().score(e)
        self._e.copy_(e)
        self._graph.replay()
        return self._score.clone()

    def _record(self, e: Tensor) -> None:
        self._calls += 1
        self._e, graph = self.validated(e).detach().clone(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._score = super().score(self._e)
            self._graph = graph
        except RuntimeError as reason:
            log.warning("no CUDA graph: %s", reason)


# --- equal forms of convolutions --------------------------------------------------------------------------------------


def _convolutions(generator: Generator) -> dict[str, int]:
    """Name -> side of the input, of all plain square convolutions that are called, always with inputs of one square shape."""
    shapes: dict[str, set[torch.Size]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: shapes.setdefault(name, set()).add(inputs[0].shape)
        )
        for name, module in generator.named_modules()
        if type(module) in (nn.Conv2d, nn.ConvTranspose2d) and _is_plain(module)
    ]
    with torch.no_grad():
        generator(_latents_like(generator, 2))
    for handle in handles:
        handle.remove()
    return {
        name: shape[-1]
        for name, found in shapes.items()
        if len(found) == 1 and len(shape := next(iter(found))) == 4 and shape[-1] == shape[-2]
    }


def _is_plain(conv: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Nothing but a square kernel, a bias and zeros around: no groups, no dilation, no hooks (such as a normed weight)."""
    (k, *others), (p, *other_paddings) = conv.kernel_size, conv.padding if isinstance(conv.padding, tuple) else (0, 1)
    return (
        others == [k]
        and other_paddings == [p]
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.bias is not None
        and conv.padding_mode == "zeros"
        and not conv._forward_pre_hooks
        and not conv._forward_hooks
    )


def _latents_like(generator: Generator, n: int) -> Tensor:
    return next(generator.parameters()).new_zeros(n, generator.latent_dim)


def _as_convolution(conv: nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
    """A transposed convolution as a convolution, where that is faster; anything else as it is."""
    if type(conv) is nn.Conv2d or conv.output_padding != (0, 0):
        return conv
    k, p, weight = conv.kernel_size[0], conv.padding[0], conv.weight
    if conv.stride == (1, 1) and p < k:
        return _convolution(weight.flip(2, 3).transpose(0, 1), conv.bias, k - 1 - p)
    if (k, conv.stride, p) == (4, (2, 2), 1) and conv.out_channels < FEW_CHANNELS:
        # the output at 2 y + a sees the inputs y - 1 + a and y + a, through the kernel's entries 3 - a and 1 - a
        dealt = weight.new_zeros(conv.out_channels, 2, 2, conv.in_channels, 3, 3)
        for a in (0, 1):
            for b in (0, 1):
                entries = weight[:, :, [3 - a, 1 - a]][..., [3 - b, 1 - b]]
                dealt[:, a, b, :, a : a + 2, b : b + 2] = entries.transpose(0, 1)
        return nn.Sequential(_convolution(dealt.flatten(0, 2), conv.bias.repeat_interleave(4), 1), nn.PixelShuffle(2))
    return conv


def _flatten_last(head: nn.Module, side: int) -> None:
    """A linear layer of flattened images, which stand in another order in memory, as a convolution with one pixel of output.

    In bfloat16 alone, where the matrix product has no advantage that pays for reordering the images.
    """
    parts = list(head) if type(head) is nn.Sequential else []
    if [type(part) for part in parts] != [nn.Conv2d, nn.Flatten, nn.GELU, nn.Linear]:
        return
    conv, flatten, gelu, linear = parts
    out = side + 2 * conv.padding[0] - conv.kernel_size[0] + 1
    if conv.stride == (1, 1) and linear.bias is not None:
        whole = _convolution(linear.weight.unflatten(1, (-1, out, out)), linear.bias, 0).to(torch.bfloat16)
        head[1], head[2], head[3] = gelu, whole.to(memory_format=torch.channels_last), flatten


def _convolution(weight: Tensor, bias: Tensor, padding: int) -> nn.Conv2d:
    n_out, n_in, k, _ = weight.shape
    conv = nn.Conv2d(n_in, n_out, k, padding=padding, device="meta").requires_grad_(False)
    conv.weight, conv.bias = (nn.Parameter(t.contiguous(), requires_grad=False) for t in (weight, bias))
    return conv


class Spectrum(nn.Module):
    """The Fourier coefficients a + i b of images [n, channels, side, side]: a, b and a + b, [3 * N * F, n, channels].

    The convolutions that see the same images, as those for mu_l and sigma_l do, share them: the last are kept.
    """

    def __init__(self, side: int, k: int, p: int) -> None:
        super().__init__()
        self.side, self.k, self.p = side, k, p
        along_width, along_height, *_ = _transforms(side, k, p)
        self.register_buffer("along_width", along_width)
        self.register_buffer("along_height", along_height)
        self._last: tuple[Tensor, tuple[int, bool], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        seen, last = (x._version, torch.is_grad_enabled()), self._last  # read once: other threads may replace it
        if last is None or last[0] is not x or last[1] != seen:
            y = x.permute(2, 3, 0, 1).reshape(self.side, self.side, -1)  # [H, W, n * channels]
            # [H * 2, F * n * channels], 2: the real, the imaginary
            y = (self.along_width @ y).reshape(2 * self.side, -1)
            last = self._last = x, seen, (self.along_height @ y).reshape(-1, *x.shape[:2])
        return last[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # part of a graph, which no copy can have


class FourierConvolution(nn.Module):
    """A convolution of stride 1 as products of Fourier coefficients: y^ = sum over channels of w^ x^, for each frequency.

    The Fourier transform of a few pixels is a small real matrix, so all is matrix products: along the width of the images,
    along the height, over the channels, and back. A product of complex numbers takes three real ones,

        re = (a + b) c - b (c + d),    im = (a + b) c + a (d - c)    of (a + i b)(c + i d)         (Gauss; Knuth 1969, 4.6.4)

    whose sums are in the matrices already. Images are held as [H, W, n, channels], which no product has to rearrange.

    Parameters
    ----------
    conv : a convolution of stride 1 with a square kernel and zeros around.
    spectrum : of its inputs; several convolutions may have one.
    """

    def __init__(self, conv: nn.Conv2d, spectrum: Spectrum) -> None:
        super().__init__()
        _, _, *back, kernel = _transforms(spectrum.side, spectrum.k, spectrum.p)
        n_out, n_in = conv.weight.shape[:2]
        weight = kernel.to(conv.weight) @ conv.weight.reshape(n_out * n_in, -1).T
        self.register_buffer("weight", weight.reshape(-1, n_out, n_in).mT.contiguous())  # [3 N F, n_in, n_out]
        self.register_buffer("bias", conv.bias.detach())
        for name, matrix in zip(("height_back", "width_back"), back):
            self.register_buffer(name, matrix.to(conv.weight))
        self.spectrum = spectrum.to(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        n, n_out, side = len(x), self.weight.shape[2], len(self.width_back)
        y = (self.spectrum(x) @ self.weight).reshape(self.height_back.shape[1], -1)  # [3 * N, F * n * n_out]
        y = (self.height_back @ y).reshape(side, self.width_back.shape[1], -1)  # [H', 2 * F, n * n_out]
        y = (self.width_back @ y).reshape(side, side, n, n_out) + self.bias
        return y.permute(2, 3, 0, 1)


@lru_cache
def _transforms(side: int, k: int, p: int) -> tuple[Tensor, ...]:
    """Matrices of a `FourierConvolution`: along width and height, back along height and width, and of the kernel; float64.

    A circle of N = side + p pixels is enough: what goes around it arrives at pixels that are not looked at, or comes from
    zeros. Real images need the frequencies 0 ... F - 1 along the width only, F = N // 2 + 1.
    """
    n, out = side + p, side + 2 * p - k + 1

    def waves(frequencies: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.outer(torch.arange(frequencies, dtype=torch.float64), positions.double()) * (2 * math.pi / n)
        return angle.cos(), angle.sin()

    f = n // 2 + 1
    cos, sin = waves(f, torch.arange(side))
    along_width = torch.cat([cos, -sin])  # [2 F, W]
    cos, sin = waves(n, torch.arange(side))
    real = torch.stack([cos, sin], -1).flatten(1)
    imaginary = torch.stack([-sin, cos], -1).flatten(1)
    along_height = torch.cat([real, imaginary, real + imaginary])  # [3 N, H * 2]
    cos, sin = (wave.T / n for wave in waves(n, torch.arange(out)))
    real = torch.cat([-sin, -cos, cos - sin], 1)  # of a (d - c), b (c + d), (a + b) c
    imaginary = torch.cat([cos, -sin, cos + sin], 1)
    height_back = torch.stack([real, imaginary], 1).flatten(0, 1)  # [H' * 2, 3 N]
    cos, sin = (wave.T / n for wave in waves(f, torch.arange(out)))
    twice = torch.full((f,), 2.0, dtype=torch.float64)  # the frequencies above F - 1 are mirror images of these
    twice[0] = 1
    if n % 2 == 0:
        twice[-1] = 1
    width_back = torch.cat([cos * twice, -sin * twice], 1)  # [W', 2 F]
    (cos_h, sin_h), (cos_w, sin_w) = (waves(frequencies, torch.arange(k) - p) for frequencies in (n, f))
    real = (cos_h[:, None, :, None] * cos_w[:, None, :] - sin_h[:, None, :, None] * sin_w[:, None, :]).reshape(
        -1, k * k
    )
    imaginary = (sin_h[:, None, :, None] * cos_w[:, None, :] + cos_h[:, None, :, None] * sin_w[:, None, :]).reshape(
        -1, k * k
    )
    kernel = torch.cat([imaginary - real, real + imaginary, real])  # d - c, c + d, c
    return along_width, along_height, height_back, width_back, kernel


def _saving(conv: nn.Module, side: int) -> float:
    """How many times fewer multiplications a `FourierConvolution` takes than this convolution; 0 for anything else."""
    if type(conv) is not nn.Conv2d or conv.stride != (1, 1):
        return 0.0
    k, p, n_in, n_out = conv.kernel_size[0], conv.padding[0], conv.in_channels, conv.out_channels
    n, out = side + p, side + 2 * p - k + 1
    f = n // 2 + 1
    there = side * side * 2 * f + 3 * n * 2 * side * f
    back = 2 * out * 3 * n * f + out * out * 2 * f
    return k * k * out * out * n_in * n_out / (there * n_in + back * n_out + 3 * n * f * n_in * n_out)
