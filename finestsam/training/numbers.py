"""Numbers that are not finite: when they end a run."""

from finestsam.training.run import Run

# Steps in a row without a finite loss and gradient after which a run has gone wrong for good.
MAX_SKIPPED_STEPS = 10
# float16's scaler begins at 2^16, and halves that in each of them until the gradient fits.
SCALING_STEPS = 16


def skips_for_good(run: Run) -> bool:
    """Whether so many steps in a row were skipped, or the weights are broken, that no further one can help."""
    skipped = run.progress.skipped_steps
    most = MAX_SKIPPED_STEPS + SCALING_STEPS * run.stepper.scaler.is_enabled()
    return skipped >= most or (skipped > 0 and not has_finite_weights(run))


def has_finite_weights(run: Run) -> bool:
    return all(bool(weight.isfinite().all()) for weight in run.loaded.model.parameters() if weight.requires_grad)


def explain_end(run: Run) -> str:
    """Return why the run must end, empty where it need not: broken weights are neither validated nor saved."""
    is_broken = not has_finite_weights(run)
    if not is_broken and not skips_for_good(run):
        return ""
    skipped = f"{run.progress.skipped_steps} steps in a row without a finite loss and gradient"
    what = "weights that are not finite" if is_broken else skipped
    advice = "a lower --opt.learning_rate or --precision 32-true may help"
    return f"stopped: {what}; last.ckpt and best.pth are from before; {advice}"
