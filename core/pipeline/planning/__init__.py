"""A rule, or a plan to be matched, and what it looks at -> a resolved plan with its companion.

Whatever is needed, images or gradients, is looked at here, once. The plan holds which entries
were chosen, so that applying it needs neither.
"""

from __future__ import annotations

from core.pipeline.planning.control import random_twin
from core.pipeline.planning.rules import Wish, plan_by_rule
from core.pipeline.planning.subject import Sight

__all__ = ["Sight", "Wish", "plan_by_rule", "random_twin"]
