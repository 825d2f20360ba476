"""What is known of the weights that training begins from: a file's, or a run's and its beginnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dptorch.errors import ConfigurationError, DataError
from dptorch.training.run_folder import PRETRAINED, RunFolder

__all__ = ["Origin", "folder_of", "origin_of"]


@dataclass(frozen=True)
class Origin:
    """What a statement says of the weights that training began from.

    Attributes:
        weights: file, run or published model.
        data: what they were trained on, in words; None if nobody said.
        epsilon, delta: the guarantee that their maker states for that data; None without privacy.
        same_data: whether it is known to be the data of this run, so that the two guarantees add up.
        before: what the statement of the run that made them says of how they came about.
        lineage: the runs that they came through, the last first: name, data, account in the ledger,
            and whether it was private. `dptorch release` leaves the place of the data out.
        earlier_on_same_data: names of private ones before the last that were on the data of this run.
    """

    weights: str
    data: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    same_data: bool = False
    before: tuple[str, ...] = ()
    lineage: tuple[Mapping[str, Any], ...] = ()
    earlier_on_same_data: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `run.json`."""
        return asdict(self)

    @property
    def note(self) -> str:
        """The same in a sentence, for the statement.

        Example:
            >>> Origin("vit.pt", "photos of the web").note[84:155]
            'without privacy. That data counts as public: nothing here protects it, '
        """
        earlier = (
            f"{name}, of which those weights came, was on the same data as this run's: what it cost "
            "adds up too."
            for name in self.earlier_on_same_data
        )
        return " ".join(
            [self._own_note, *(f"Of those weights: {each}" for each in self.before), *earlier]
        )

    @property
    def _own_note(self) -> str:
        data = self.data or "data that nobody named"
        began = f"training began from the weights of {self.weights}, which were trained on {data}"
        if self.epsilon is None:
            return (
                f"{began}, without privacy. That data counts as public: nothing here protects it, nor "
                "what of it is in this run's data too."
            )
        budget = f"({self.epsilon:g}, {self.delta:g})" if self.delta else f"{self.epsilon:g}"
        if self.same_data:
            return (
                f"{began} with {budget}-differential privacy: the same data as this run's. The two "
                "guarantees add up; dptorch ledger total says what both cost together."
            )
        return (
            f"{began} with {budget}-differential privacy, as their maker states. That guarantee is for "
            "that data; for what of it is in this run's data too, the two guarantees add up."
        )


def origin_of(
    path: str,
    data: str | None,
    epsilon: float | None,
    delta: float | None,
    own_data: str,
    *,
    protects: bool = True,
) -> Origin:
    """What is known of the weights at `path`.

    Args:
        path: a file, or the folder of a run.
        data, epsilon, delta: as the user says; of a run its own record says it.
        own_data: where the data of the run to come is.
        protects: whether that run is to be private.

    Raises:
        ConfigurationError: a δ without ε, or numbers for a run that has its own; or a run without
            privacy on the same data.
        DataError: the run has no statement.
    """
    folder = folder_of(path)
    if folder is None and Path(path).is_dir():
        raise DataError(f"{path}: neither a run, whose folder has run.json, nor a file of weights.")
    if folder is None:
        if delta is not None and epsilon is None:
            raise ConfigurationError(f"init_delta={delta:g} without init_epsilon: give both.")
        return Origin(Path(path).name, data, epsilon, delta)
    if data is not None or epsilon is not None or delta is not None:
        raise ConfigurationError(
            f"init={path!r} is of a run, whose statement says its data and its ε. Leave out init_data, "
            "init_epsilon and init_delta."
        )
    about = folder.read_json("run.json")
    if "statement" not in about:
        raise DataError(f"{path}: that run has neither finished nor been interrupted in order.")
    claims = about["statement"]
    lineage = tuple(_lineage(folder, about))
    same = [each for each in lineage if _is_same_data(each, own_data)]
    bare = next((each for each in same if not each["private"]), None)
    if bare is not None and protects:
        which = "was" if bare is lineage[0] else f"began from the run {bare['run']}, which was"
        raise ConfigurationError(
            f"init={path!r} {which} trained without privacy (or with noise from a known seed) on the "
            "data of this run, and nothing that follows would protect it. Begin with weights of other "
            "data, or with a private run."
        )
    private = lineage[0]["private"]
    return Origin(
        f"the run {lineage[0]['run']}",
        about["data"]["source"],
        claims["epsilon"] if private else None,
        claims["delta"] if private else None,
        same_data=lineage[0] in same,
        before=tuple(claims["notes"]),
        lineage=lineage,
        earlier_on_same_data=tuple(
            f"the run {each['run']}" for each in same if each["private"] and each is not lineage[0]
        ),
    )


def folder_of(path: str) -> RunFolder | None:
    """The folder of the run that weights are of; None for others.

    Args:
        path: a run's folder, or the file or the folder ``model/`` in it.
    """
    given = Path(path)
    parent = [given.parent] if given.suffix == ".safetensors" or given.name == PRETRAINED else []
    found = next((each for each in (given, *parent) if (each / "run.json").is_file()), None)
    return None if found is None else RunFolder(found)


def _lineage(folder: RunFolder, about: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The run and those that it began from."""
    from dptorch.ledger.dataset_id import of_path

    claims, data = about["statement"], about["job"].get("data")
    account = (claims.get("ledger") or {}).get("dataset")
    yield {
        "run": folder.path.resolve().name,
        "data": None if data is None else _place(data),
        "account": account or (None if data is None else of_path(data)),
        "private": claims["plan"]["noise_multiplier"] > 0 and claims["private_randomness"],
    }
    yield from (about["model"].get("began_from") or {}).get("lineage", ())


def _is_same_data(run: Mapping[str, Any], own_data: str) -> bool:
    """Whether a run is known to be on the data at `own_data`: by its place, or by the identity beside
    it that the ledger of both has."""
    from dptorch.ledger.dataset_id import of_path

    if run.get("data") is not None and run["data"] == _place(own_data):
        return True
    return run["account"] is not None and of_path(own_data) == run["account"]


def _place(data: str) -> str:
    return data if data.startswith(("hub:", "package:")) else str(Path(data).resolve())
