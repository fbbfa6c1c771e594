"""Sizes of test and validation set that whole groups of related rows can give."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from slm_lora.data.splits import GroupingRule, draw_groups, group_rows, seeded_order
from slm_lora.records import Row

LEAST_GROUPS = 10
"""As `stats.inference.LEAST_GROUPS`, which lies above this layer: fewer groups show nothing."""


class GroupedRows:
    """The rows of a data set by groups of related rows, in the order of the held-out draw.

    Args:
        rows: of the data set.
        rule: how rows are related.
        split_seed: of the recipe.
    """

    def __init__(self, rows: Sequence[Row], rule: GroupingRule, split_seed: int = 0) -> None:
        members: dict[str, list[str]] = defaultdict(list)
        for row_id, group_id in group_rows(rows, rule).group_of.items():
            members[group_id].append(row_id)
        self._groups = [members[group] for group in seeded_order(members, "held out", split_seed)]
        self.rows = len(rows)

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(self._groups)

    def sizes_near(self, test: int, validation: int) -> tuple[int, int]:
        """Sizes near the wanted ones that `splits.split_rows` draws exactly.

        Both sets get at least `LEAST_GROUPS` groups, and leave as many for each later set; of fewer
        groups in all, each set gets a third.
        """
        groups, sizes = self._groups, []
        least = max(1, min(LEAST_GROUPS, self.count // 3))
        for wanted, later in ((test, 2), (validation, 1)):
            taken = draw_groups(groups, wanted)
            while len(taken) < least:
                wanted += 1
                taken = draw_groups(groups, wanted)
            sizes.append(sum(map(len, taken[: len(groups) - later * least])))
            drawn = {group[0] for group in draw_groups(groups, sizes[-1])}
            groups = [group for group in groups if group[0] not in drawn]
        return sizes[0], sizes[1]
