"""Hold a data set to its order, where a record's place in it decides when the record takes part again.

Schemes that deal each record into one step of an epoch, or into groups that take turns, know records by
their place. In another order a record could take part twice where its accounting counts on once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dptorch.distributed import Ranks
from dptorch.distributed.agreement import digest_of_examples, digest_of_values
from dptorch.errors import PrivacyError
from dptorch.plan import PrivacyPlan
from dptorch.sampling import PrivateLoader

__all__ = ["Places"]


class Places:
    """Compares the data sets of a run: their number of records, and some of these.

    Guarantees:
        A data set in another order is refused before a batch of it is handed out, in the middle of an
        epoch or, where groups take turns, anywhere in the run; also after a checkpoint. One that holds
        the examples that are compared in their places is not told apart.
        Held by `test_another_order_in_the_middle_of_an_epoch_is_refused`.
    """

    def __init__(self, plan: PrivacyPlan, ranks: Ranks) -> None:
        self._kept = plan.places_kept
        self._steps_per_epoch = plan.terms.steps_per_epoch
        self._ranks = ranks
        self._records: int | None = None
        self._order: str | None = None

    def watch(self, loader: PrivateLoader, user_ids: Any) -> None:
        """Compare the data set of a loader now, and whenever an iteration of it begins.

        Raises:
            PrivacyError: it has another number of records.
        """
        if not self._kept:
            return
        size = loader.sampler.sample_size
        if self._kept == "the run" and self._records not in (None, size):
            raise PrivacyError(
                f"the run has drawn from a data set of {self._records} records, and this one has "
                f"{size}: a record would change its place, and could take part again too soon. Go on "
                "with the same data set, in the same order."
            )
        self._records = size
        begun: list[int] = []

        def look(_: object) -> None:
            if begun:  # not before: workers are forked, and data sets open files when they are read
                self._compare(loader, user_ids, begun.pop())
                begun.clear()

        loader.on_start(begun.append)
        loader.on_batch(look)

    def _compare(self, loader: PrivateLoader, user_ids: Any, step: int) -> None:
        with self._ranks.together():
            size = loader.sampler.sample_size
            order = f"{size} {digest_of_examples(loader.dataset)} {digest_of_values(user_ids)}"
            inside = self._kept == "the run" or step % self._steps_per_epoch
            if inside and self._order not in (None, order):
                raise PrivacyError(
                    f"the data set of step {step} is another one, or in another order, than "
                    f"{self._kept} was begun with. A record's place decides when it takes part, and "
                    "so it could take part again too soon. Go on with the same data set, in the same "
                    "order, and change it between epochs only (under noise that is correlated "
                    "over steps not at all); or use sampling='poisson', which needs no order."
                )
            self._order = order

    def values(self) -> dict[str, Any]:
        """Return what was seen, as plain values for `restore`."""
        return {"records": self._records, "order": self._order}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on from `values`, of a checkpoint that may be older than they are."""
        self._records, self._order = values.get("records"), values.get("order")
