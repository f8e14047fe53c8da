"""TwoNN by another library, in an environment of its own, for `make bench`. Prints CPU seconds and the dimension."""

from __future__ import annotations

import contextlib
import io
import sys
import time

import numpy as np


def dadapy(x: np.ndarray) -> float:
    from dadapy import IdEstimation

    return IdEstimation(x, maxk=3, n_jobs=1).compute_id_2NN(mu_fraction=0.9)[0]


def skdim(x: np.ndarray) -> float:
    from skdim.id import TwoNN

    return TwoNN(discard_fraction=0.1).fit(x).dimension_


def main() -> None:
    estimate, x = globals()[sys.argv[1]], np.load(sys.argv[2])
    with contextlib.redirect_stdout(io.StringIO()):
        estimate(x[:500])  # libraries load before the clock starts
        start = time.process_time()
        dimension = estimate(x)
        seconds = time.process_time() - start
    print(seconds, dimension)


if __name__ == "__main__":
    main()
