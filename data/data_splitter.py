"""Splits of rows in time that no label can cross.

A label of row ``t`` is known at its label end. A training row may stand before a test block only when its
label ended before the block began (purge), with a further distance where features remember (embargo). Panels,
where many symbols share a session, are split by session, never by row.
"""

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import KW_ONLY, dataclass
from itertools import combinations, pairwise
from typing import cast

import numpy as np
import numpy.typing as npt

from utils.base import DataError, InsufficientDataError, ModelError, UsageError

IntArray = npt.NDArray[np.intp]
DateArray = npt.NDArray[np.datetime64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PurgedTimeSeriesSplit:
    """Expanding (or rolling) training rows before successive test blocks, purged by label end.

    Without label ends, a label is taken to end ``purge_bars`` rows after its row, and the folds are those of
    scikit-learn's ``TimeSeriesSplit(gap=purge_bars + embargo_bars)``.

    Parameters
    ----------
    n_splits, test_size_bars
        Number of test blocks and rows of one (default: rows // (n_splits + 1)): the last rows, without holes.
    purge_bars, embargo_bars
        Rows that a label spans at least, and further rows between the last label end and the test block.
    max_train_bars
        Keep at most so many of the latest training rows (rolling); None keeps all (anchored).

    References
    ----------
    Lopez de Prado (2018), Advances in Financial Machine Learning, chapter 7.
    """

    n_splits: int = 5
    _: KW_ONLY
    test_size_bars: int | None = None
    purge_bars: int = 0
    embargo_bars: int = 0
    max_train_bars: int | None = None

    def __post_init__(self) -> None:
        _check_at_least(1, self, "n_splits", "test_size_bars", "max_train_bars")
        _check_at_least(0, self, "purge_bars", "embargo_bars")

    def split(
        self,
        n_rows_or_x: int | Sized,
        label_end_position: npt.ArrayLike | None = None,
        *,
        date: DateArray | None = None,
    ) -> Iterator[tuple[IntArray, IntArray]]:
        """Yield (training rows, test rows), both ascending.

        ``label_end_position``, (n,), is the row at which each row's label is known, n or more if never. With
        ``date``, (n,), the session of each row, no session stands on both sides. Raises
        ``InsufficientDataError`` if a fold has no training row left, ``DataError`` if a label ends before its
        row, or dates do not ascend.
        """
        n_rows = n_rows_or_x if isinstance(n_rows_or_x, int) else len(n_rows_or_x)
        label_end = _label_ends(n_rows, label_end_position, self.purge_bars)
        starts = self._starts(n_rows, date)
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], n_rows], strict=True)):
            train = np.flatnonzero(label_end[:start] < start - self.embargo_bars)
            if self.max_train_bars is not None:
                train = train[-self.max_train_bars :]
            if not len(train) or start == stop:
                raise InsufficientDataError(
                    f"fold {number} of {self.n_splits} has {len(train)} training, {stop - start} test rows: "
                    f"give more than {n_rows} rows, or fewer splits"
                )
            yield train, np.arange(start, stop)

    def _starts(self, n_rows: int, date: DateArray | None) -> list[int]:
        size = self.test_size_bars or n_rows // (self.n_splits + 1)
        first = n_rows - self.n_splits * size
        if size < 1 or first < 1:
            raise InsufficientDataError(
                f"{n_rows} rows do not give {self.n_splits} test blocks of {max(size, 1)} rows and training "
                "rows before them: give more rows or fewer splits"
            )
        starts = np.arange(first, n_rows, size)
        if date is not None:
            _check_ascending(date, n_rows)
            starts = np.searchsorted(date, date[starts], side="left")
        return [int(start) for start in starts]


def create_train_val_test_split(
    n_rows: int,
    *,
    validation_fraction: float = 0.2,
    test_fraction: float = 0.2,
    purge_bars: int = 0,
    embargo_bars: int = 0,
    label_end_position: npt.ArrayLike | None = None,
) -> tuple[IntArray, IntArray, IntArray]:
    """Split rows once, in time: return training, validation and, last, test rows, ascending.

    Shares are rounded down; ``purge_bars``, ``embargo_bars`` and ``label_end_position`` are those of
    `PurgedTimeSeriesSplit`, and both borders are purged. ``InsufficientDataError`` if a part would be empty.
    """
    n_test, n_validation = int(n_rows * test_fraction), int(n_rows * validation_fraction)
    label_end, rows = _label_ends(n_rows, label_end_position, purge_bars), np.arange(n_rows)
    borders = (0, n_rows - n_test - n_validation, n_rows - n_test)
    train, validation = (
        rows[start:stop][label_end[start:stop] < stop - embargo_bars] for start, stop in pairwise(borders)
    )
    test = rows[borders[-1] :]
    if min(len(train), len(validation), len(test)) < 1:
        raise InsufficientDataError(
            f"{n_rows} rows leave {len(train)} for training, {len(validation)} for validation and "
            f"{len(test)} for the test (purge {purge_bars}, embargo {embargo_bars}): give more rows"
        )
    return train, validation, test


def split_latest(
    date: DateArray, label_end: DateArray, share: float, *, at_least_rows: int
) -> tuple[IntArray, IntArray]:
    """Set the latest sessions apart: return rows whose labels ended before these, and the rows of these.

    ``date`` and ``label_end``, (n,): session of each row, and the one at whose close its label is known;
    ``share`` is that of the sessions. Raises ``InsufficientDataError`` when a side has too few rows.
    """
    sessions, position = np.unique(date, return_inverse=True)
    start = min(int(len(sessions) * (1 - share)), len(sessions) - 1)
    later = np.flatnonzero(position >= start)
    earlier = np.flatnonzero((position < start) & (label_end < sessions[start]))
    if min(len(earlier), len(later)) < at_least_rows:
        raise InsufficientDataError(
            f"{len(date)} training rows give {len(earlier)} to learn and {len(later)} to stop by, "
            f"{at_least_rows} of each are needed: give a longer history"
        )
    return earlier, later


@dataclass(frozen=True, slots=True)
class CombinatorialPurgedSplit:
    """Every choice of ``n_test_blocks`` out of ``n_blocks`` as the test, purged on both sides.

    Training rows may follow a test block here: those that its labels reach into are dropped, and an embargo.

    Parameters
    ----------
    n_blocks, n_test_blocks
        Number of consecutive blocks of nearly equal length, and how many are the test of one split.
    purge_bars
        Rows that a label spans at least.
    embargo_bars
        Further rows dropped after a test block.

    References
    ----------
    Lopez de Prado (2018), Advances in Financial Machine Learning, chapter 12.
    """

    n_blocks: int = 6
    n_test_blocks: int = 2
    _: KW_ONLY
    purge_bars: int = 0
    embargo_bars: int = 0

    def __post_init__(self) -> None:
        if (n := self.n_test_blocks) >= self.n_blocks:
            raise UsageError(f"{n} of {self.n_blocks} blocks as the test: choose fewer than {self.n_blocks}")
        _check_at_least(1, self, "n_blocks", "n_test_blocks")
        _check_at_least(0, self, "purge_bars", "embargo_bars")

    def split(
        self, n_rows_or_x: int | Sized, label_end_position: npt.ArrayLike | None = None
    ) -> Iterator[tuple[IntArray, tuple[IntArray, ...]]]:
        """Yield (training rows, the test blocks' rows), in the order of `itertools.combinations`.

        All rows are taken to be labelled: drop those that are not before splitting.

        Raises
        ------
        InsufficientDataError
            If a split has no training row left.
        """
        n_rows = n_rows_or_x if isinstance(n_rows_or_x, int) else len(n_rows_or_x)
        label_end = _label_ends(n_rows, label_end_position, self.purge_bars)
        blocks = np.array_split(np.arange(n_rows), self.n_blocks)
        for chosen in combinations(range(self.n_blocks), self.n_test_blocks):
            tests = tuple(blocks[i] for i in chosen)
            train = np.flatnonzero(self._allowed(n_rows, label_end, tests))
            if not len(train) or min(len(test) for test in tests) < 1:
                raise InsufficientDataError(
                    f"{n_rows} rows in {self.n_blocks} blocks leave no training rows beside test blocks "
                    f"{chosen}: give more rows or fewer blocks"
                )
            yield train, tests

    def _allowed(self, n_rows: int, label_end: IntArray, tests: Sequence[IntArray]) -> BoolArray:
        rows = np.arange(n_rows)
        allowed = np.ones(n_rows, dtype=np.bool_)
        for test in tests:
            first, last_known = int(test[0]), int(label_end[test].max())
            before = (rows < first) & (label_end < first)
            after = rows > max(last_known, int(test[-1])) + self.embargo_bars
            allowed &= before | after
        return allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """One step of a walk-forward: rows, ascending; test rows may be unlabelled, training rows never are.

    ``train_end`` is the latest session whose prices a training label uses; ``number`` counts from 0.
    """

    number: int
    train_idx: IntArray
    test_idx: IntArray
    test_start: np.datetime64
    test_end: np.datetime64
    train_end: np.datetime64


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkForwardSplit:
    """Successive test blocks of a panel, split by session; before each, the rows whose labels were known.

    Every row from the first test session on lies in exactly one test block, the unlabelled ones too.

    Attributes
    ----------
    test_bars, min_train_bars
        Sessions of one test block (the last may be shorter), and those that the first fold trains on.
    lag_bars, embargo_bars
        Sessions between a decision and the first return that it earns, and further ones between the last
        training label and the test block.
    max_train_bars
        Train on at most so many of the latest sessions (rolling); None trains on all (anchored).
    """

    test_bars: int = 252
    min_train_bars: int = 756
    lag_bars: int = 1
    embargo_bars: int = 5
    max_train_bars: int | None = None

    def __post_init__(self) -> None:
        _check_at_least(1, self, "test_bars", "min_train_bars", "max_train_bars")
        _check_at_least(0, self, "lag_bars", "embargo_bars")

    def folds(self, date: DateArray, label_end: DateArray, *, horizon_bars: int) -> list[Fold]:
        """Return the folds of a panel, at least one.

        Training labels ended ``lag_bars + embargo_bars`` sessions before a fold's first one.

        Parameters
        ----------
        date, label_end
            Session of each row, (n,), ascending, and the one at whose close its label is known, NaT if none.
        horizon_bars
            Sessions that a label spans at least.

        Raises
        ------
        InsufficientDataError, DataError
            If no session is left to test on; if dates do not ascend, or a label ends too soon after its row.
        """
        _check_ascending(date, len(label_end))
        sessions, position = np.unique(date, return_inverse=True)
        labelled = ~np.isnat(label_end)
        # A label end between two sessions of the panel counts as the later one.
        label_position = np.searchsorted(sessions, label_end, side="left")
        _check_spans(date[labelled], label_end[labelled], horizon_bars)
        distance = self.lag_bars + self.embargo_bars
        first = self.min_train_bars + horizon_bars + distance - 1
        if len(sessions) <= first:
            raise InsufficientDataError(
                f"{len(sessions)} sessions are too few to walk forward: {self.min_train_bars} to train on, "
                f"{horizon_bars + distance} between and 1 to test on make {first + 1}; give a longer history"
            )
        folds = []
        for number, start in enumerate(range(first, len(sessions), self.test_bars)):
            stop = min(start + self.test_bars, len(sessions))
            train = np.flatnonzero(labelled & (label_position <= start - distance))
            if self.max_train_bars is not None and len(train):
                train = train[position[train] > position[train].max() - self.max_train_bars]
            folds.append(_fold(number, train, np.searchsorted(position, [start, stop]), date, label_end))
        return folds


def _fold(number: int, train: IntArray, bounds: IntArray, date: DateArray, label_end: DateArray) -> Fold:
    test = np.arange(bounds[0], bounds[1])
    if not len(train):
        raise InsufficientDataError(f"fold {number}, from {date[test[0]]} on, has no labelled row before it")
    return Fold(
        number=number,
        train_idx=train,
        test_idx=test,
        test_start=cast("np.datetime64", date[test[0]]),
        test_end=cast("np.datetime64", date[test[-1]]),
        train_end=cast("np.datetime64", label_end[train].max()),
    )


def _label_ends(n_rows: int, label_end_position: npt.ArrayLike | None, purge_bars: int) -> IntArray:
    rows = np.arange(n_rows)
    if label_end_position is None:
        return rows + purge_bars
    ends = np.asarray(label_end_position, dtype=np.intp)
    if ends.shape != (n_rows,):
        raise DataError(f"label_end_position has shape {ends.shape}, expected ({n_rows},)")
    if (ends < rows).any():
        row = int(np.argmax(ends < rows))
        raise DataError(f"the label of row {row} ends at row {int(ends[row])}, before it begins")
    return np.maximum(ends, rows + purge_bars)


def _check_spans(date: DateArray, label_end: DateArray, horizon_bars: int) -> None:
    # Sessions are a day apart at least, and rows may be missing between them: days are the safe measure.
    days = (label_end - date).astype("timedelta64[D]").astype(np.int64)
    if (days < horizon_bars).any():
        row = int(np.argmax(days < horizon_bars))
        raise DataError(
            f"the label of {date[row]} ends on {label_end[row]}, sooner than {horizon_bars} sessions later: "
            "purging by it would leak"
        )


def _check_ascending(date: DateArray, n_rows: int) -> None:
    if len(date) != n_rows:
        raise DataError(f"{len(date)} dates for {n_rows} rows")
    if np.isnat(date).any() or (date[1:] < date[:-1]).any():
        raise DataError("dates are not ascending: sort the rows by session before splitting")


def _check_at_least(least: int, splitter: object, *names: str) -> None:
    for name in names:
        value = getattr(splitter, name)
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}, it must be at least {least}")


def walk_rows(
    fit: Callable[[IntArray], Callable[[IntArray], FloatArray]],
    date: DateArray,
    label_end: DateArray,
    split: WalkForwardSplit,
    *,
    horizon_bars: int,
) -> FloatArray:
    """Walk anything forward over rows, one level up from what made them: no row is scored by a fit on it.

    ``fit`` takes the rows to learn from, and returns what forecasts the rows that it is given; the rest is as
    for `WalkForwardSplit.folds`. Returns forecasts, (n,), NaN before the first fold. Raises ``ModelError`` if
    a label to learn from ends in or after the rows to be scored.
    """
    said = np.full(len(date), np.nan)
    for fold in split.folds(date, label_end, horizon_bars=horizon_bars):
        first = date[fold.test_idx].min()
        if reaching := int((~(label_end[fold.train_idx] < first)).sum()):
            raise ModelError(
                f"fold {fold.number}: {reaching} labels to learn from end in or after the rows that are "
                f"scored, from {first} on: purge them"
            )
        said[fold.test_idx] = fit(fold.train_idx)(fold.test_idx)
    return said
