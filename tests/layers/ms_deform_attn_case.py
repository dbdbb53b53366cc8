"""Random arguments of deformable attention, and what they should give."""

import torch

from dimaskdino.layers.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from dimaskdino.layers.ms_deform_attn_reference import (
    ms_deform_attn_fused_reference,
    ms_deform_attn_reference,
    sampling_locations,
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Of the rounded result, relative to the largest element.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of locations, weights and references, where values are of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Case:
    """Random arguments of given sizes, for both forms; ``low`` gives offsets and logits the dtype of the values.

    No sample lies within rounding of a row or column of pixel centers, where the gradient of its location jumps.
    """

    def __init__(
        self,
        *,
        dtype,
        channels,
        shapes,
        points,
        queries,
        batch=2,
        heads=3,
        reference_size=2,
        low=False,
        seed=0,
        device="cpu",
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        acc = accumulate_dtype(dtype)
        samples = (batch, queries, heads, len(shapes), points)
        tokens = sum(height * width for height, width in shapes)
        self.shapes, self.dtype, self.acc = shapes, dtype, acc
        self.value = normal(batch, tokens, heads, channels).to(device, dtype)
        self.grad = normal(batch, queries, heads * channels).to(device, dtype)
        self.weights = normal(*samples).to(device, acc)
        reference = torch.rand(batch, queries, reference_size, generator=generator, dtype=torch.float64)
        self.reference = (0.1 + 0.9 * reference).to(acc)
        # A good part of the samples on each side of the border, some far away.
        self.locations = _away_from_centers(lambda: (0.5 + 0.5 * normal(*samples, 2)).to(acc), shapes, lambda x: x)
        self.offsets = _away_from_centers(
            lambda: (2 * normal(*samples, 2)).to(dtype if low else acc),
            shapes,
            lambda offsets: sampling_locations(self.reference.double(), offsets, shapes),
        )
        self.locations, self.offsets = self.locations.to(device), self.offsets.to(device)
        self.reference = self.reference.to(device)
        self.logits = (2 * normal(*samples)).to(device, dtype if low else acc)

    @property
    def args(self):
        return self.value, self.shapes, self.locations, self.weights

    @property
    def fused_args(self):
        return self.value, self.shapes, self.reference, self.offsets, self.logits


def _away_from_centers(draw, shapes, locate):
    """Draw once, and those again whose location is too near to a pixel's center in x or y."""
    drawn = draw()
    sizes = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64).view(-1, 1, 2)
    while True:
        pixels = locate(drawn.double()) * sizes - 0.5
        near = ((pixels - pixels.round()).abs() < 2e-4) & (sizes > 0)
        if not near.any():
            return drawn
        drawn = torch.where(near, draw(), drawn)


def expected(form, grad, value, shapes, *samples):
    """Output and all gradients in float64."""
    inputs = [x.double().requires_grad_() for x in (value, *samples)]
    output = form(inputs[0], shapes, *inputs[1:])
    return output.detach(), *torch.autograd.grad(output, inputs, grad.double())


def assert_close(got, wanted, dtype=None, factor=1.0):
    """Equal up to the rounding of ``got``'s dtype, or of the given one where that is coarser."""
    assert got.shape == wanted.shape
    tolerance = factor * max(TOLERANCE[got.dtype], TOLERANCE[dtype or got.dtype])
    scale = wanted.abs().max().item() if wanted.numel() else 1.0
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance * max(scale, 1e-3))


# The public function and the reference form of each kind of arguments.
FORMS = {
    "locations": (ms_deform_attn, ms_deform_attn_reference),
    "fused": (ms_deform_attn_fused, ms_deform_attn_fused_reference),
}


def args_of(case, form):
    """The arguments of one form."""
    return case.args if form == "locations" else case.fused_args


def run(form, case):
    """Output and all gradients of the public function."""
    value, shapes, *samples = args_of(case, form)
    inputs = [x.detach().clone().requires_grad_() for x in (value, *samples)]
    output = FORMS[form][0](inputs[0], shapes, *inputs[1:])
    return output.detach(), *torch.autograd.grad(output, inputs, case.grad)


def check(form, case, *, factor, got=None):
    """What the public function gives, or ``got``, is what the reference form gives in float64.

    Gradients may be ``factor`` times the tolerance off: they are sums over many queries.
    """
    output, *grads = run(form, case) if got is None else got
    wanted = expected(FORMS[form][1], case.grad, *args_of(case, form))
    assert output.dtype == case.dtype
    assert output.is_contiguous()
    assert_close(output, wanted[0])
    for one, other in zip(grads, wanted[1:], strict=True):
        assert_close(one, other, factor=factor)
