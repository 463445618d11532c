"""The privacy that a run spends, by the accountants of Opacus.

Each step is a Gaussian mechanism on a Poisson sample. "rdp" adds up Rényi divergences (Mironov et al. 2019, arXiv
1908.10530), "prv" composes privacy loss random variables numerically (Gopi et al. 2021, arXiv 2106.02848), which gives
a smaller upper bound of epsilon and takes longer.
"""

from __future__ import annotations

import math
import warnings
from types import ModuleType

from normfree.suggest import needs, problem

ACCOUNTANTS = ("rdp", "prv")


def noise_for(epsilon: float, *, delta: float, sample_rate: float, steps: int, accountant: str) -> float:
    """Return the noise multiplier with which all steps together spend at most `epsilon`; 0 for an infinite one.

    Raises:
        ModuleNotFoundError: Opacus is not installed.
        ValueError: no noise is enough.
    """
    if math.isinf(epsilon):
        return 0.0
    utils = _opacus_accountants().utils
    with warnings.catch_warnings():  # the search also tries values at which the accountant is not tight
        warnings.simplefilter("ignore")
        try:
            noise: float = utils.get_noise_multiplier(
                target_epsilon=epsilon, target_delta=delta, sample_rate=sample_rate, steps=steps,
                accountant=accountant,
            )  # fmt: skip
        except ValueError:
            given = f"epsilon={epsilon:g} with {steps} steps that each take {100 * sample_rate:.3g} % of the images"
            fix = "a larger epsilon, fewer steps or a smaller batch"
            raise ValueError(problem(given, allowed="what noise can reach", fix=fix)) from None
    return noise


def epsilon_of(noise: float, *, delta: float, sample_rate: float, steps: int, accountant: str) -> float:
    """Return the epsilon that `steps` steps spend; infinite without noise."""
    if steps == 0 or noise == 0.0:
        return 0.0 if steps == 0 else math.inf
    account = _opacus_accountants().create_accountant(accountant)
    account.history = [(noise, sample_rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return max(0.0, float(account.get_epsilon(delta=delta)))


def _opacus_accountants() -> ModuleType:
    """Return the module `opacus.accountants`."""
    with needs("a private run", install="normfree[private]"):
        from opacus import accountants
    module: ModuleType = accountants
    return module
