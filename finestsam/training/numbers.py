"""Numbers that are not finite: when they end a run."""

from torch import nn

from finestsam.training.state import RunState

# Steps in a row without a finite loss and gradient after which a run has gone wrong for good.
MAX_SKIPPED_STEPS = 10
# float16's scaler begins at 2^16, and halves that in each of them until the gradient fits.
SCALING_STEPS = 16


def skips_for_good(state: RunState) -> bool:
    """Whether so many steps in a row were skipped, or the weights are broken, that no further one can help."""
    skipped = state.progress.skipped_steps
    most = MAX_SKIPPED_STEPS + SCALING_STEPS * state.scaler.is_enabled()
    return skipped >= most or (skipped > 0 and not has_finite_weights(state.model))


def has_finite_weights(model: nn.Module) -> bool:
    return all(bool(weight.isfinite().all()) for weight in model.parameters() if weight.requires_grad)


def explain_end(state: RunState) -> str:
    """Return why the run must end, empty where it need not: broken weights are neither validated nor saved."""
    is_broken = not has_finite_weights(state.model)
    if not is_broken and not skips_for_good(state):
        return ""
    skipped = f"{state.progress.skipped_steps} steps in a row without a finite loss and gradient"
    what = "weights that are not finite" if is_broken else skipped
    advice = "a lower --opt.learning_rate or --precision 32-true may help"
    return f"stopped: {what}; last.ckpt and best.pth are from before; {advice}"
