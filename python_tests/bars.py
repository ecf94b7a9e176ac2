"""Error bars for comparisons with float64."""

import torch


def assert_as_good_as_torch(ours, plain, exact, *, slack=2.0, floor=1e-7):
    """The error of ``ours`` is at most ``slack`` times that of plain torch at the same precision.

    Both errors are measured against ``exact`` (float64). ``floor`` covers the case that plain torch
    is exact by luck. Shapes and the places of NaN and inf must agree.
    """
    assert ours.shape == exact.shape
    assert torch.equal(torch.isfinite(ours), torch.isfinite(exact))
    finite = torch.isfinite(exact)
    error = (ours.double() - exact)[finite].abs()
    plain_error = (plain.double() - exact)[finite].abs()
    if error.numel() == 0:
        return
    bar = slack * plain_error.max().item() + floor * max(1.0, exact[finite].abs().max().item())
    assert error.max().item() <= bar, f"max error {error.max():.3e} > {bar:.3e}"
