"""How pytest-xdist spreads the tests over its workers: whole files or single tests, in order.

Files share fixtures of their module, and a worker gets one at a time, so whole files are best where
a fixture is slow, and where tests are many and fast. The other tests go one by one, which keeps
all workers busy to the end.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from xdist.scheduler import LoadScopeScheduling

WHOLE = {"test_lm_eval.py", "test_ray.py", "test_soak.py", "test_accuracy.py"}
"""Files whose fixtures are slow or large: a cluster, tasks of lm-eval, answers of a model."""


class Spread(LoadScopeScheduling):
    """Sends files of unit tests and of `WHOLE` to a worker as they are, and other tests singly.

    Tests start in the order of their collection.
    """

    def __init__(self, config: Any, log: Any = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        file = PurePosixPath(nodeid.partition("::")[0])
        return str(file) if file.name in WHOLE or file.parent.name == "unit" else nodeid
