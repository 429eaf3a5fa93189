"""How pytest-xdist spreads the tests over its workers: whole files, groups or tests, in order.

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

TAKING_TURNS = {
    "test_granite_4_h_1b_in_bfloat16_is_as_accurate_as_sdpa",
    "test_a_prompt_of_32768_tokens_is_as_accurate_as_sdpa",
    "test_log_probabilities_are_as_accurate_as_those_of_sdpa",
}
"""Tests that hold a float64 model for most of their time, one after the other (`large_turn`). In
workers of their own, all but one of them would wait."""


class Spread(LoadScopeScheduling):
    """Sends files of unit tests and of `WHOLE` as they are, `TAKING_TURNS` together, others singly.

    Tests start in the order of their collection.
    """

    def __init__(self, config: Any, log: Any = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        path, _, test = nodeid.partition("::")
        if test.partition("[")[0] in TAKING_TURNS:
            return "float64"
        file = PurePosixPath(path)
        return str(file) if file.name in WHOLE or file.parent.name == "unit" else nodeid
