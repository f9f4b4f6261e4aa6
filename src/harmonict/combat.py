"""ComBat on feature tables: location and scale of each batch (a kernel, a scanner, a site) brought to a common one.

Parametric empirical Bayes (Johnson et al. 2007), estimated by neuroCombat's own functions, fitted once and applied to
rows that the fit has not seen. It works on numbers, not on images: it is no Harmonizer, on purpose.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from neuroCombat.neuroCombat import (
    find_parametric_adjustments,
    fit_LS_model_and_find_priors,
    standardize_across_features,
)

from harmonict.core import HarmonictError
from harmonict.core.files import write_whole
from harmonict.radiomics.table import KEYS, check_features

FORMAT = "harmonict-combat-1"


@dataclass(frozen=True)
class Combat:
    """Estimates of a fit. Everything that `apply_combat` needs and `save_combat` writes.

    batch: the column that names the batch. batches: its values in the fit, in order; reference: one of them, or None.
    features: F names. mean, sd: (F,), the grand (or reference) mean and the pooled (or reference) SD. shift, scale:
    (batches, F), neuroCombat's gamma* and delta* (a variance ratio). rows: how many rows of each batch were fitted.
    """

    batch: str
    batches: tuple[str, ...]
    reference: str | None
    features: tuple[str, ...]
    mean: np.ndarray
    sd: np.ndarray
    shift: np.ndarray
    scale: np.ndarray
    rows: tuple[int, ...]


def fit_combat(table: pd.DataFrame, *, batch: str, reference: str | None = None) -> Combat:
    """Estimate ComBat on the rows of a feature table.

    batch: the column (or index level, "scan" say) whose value names a row's batch. reference: the batch that stays as
    it is and to which the others are brought; None brings all to the grand mean and the pooled variance.
    There are no covariates: what differs between the patients of two batches is taken off with the batch, so batches
    should hold the same patients, or patients of one kind.

    Raises HarmonictError, in words, for a NaN, a batch with fewer than two rows, fewer than two batches or features,
    a feature that is constant in a batch, an unknown reference.
    """
    features = check_features(table.drop(columns=[batch]) if _is_column(table, batch) else table)
    label = _batch_of(table, features, batch)
    found, code, counts = np.unique(label, return_inverse=True, return_counts=True)
    names = found.tolist()
    if len(names) < 2:
        raise HarmonictError(f"ComBat needs two batches, {batch!r} has only {names[0]!r}")
    if counts.min() < 2:
        alone = names[counts.argmin()]
        raise HarmonictError(f"batch {alone!r} of {batch!r} has one row: its spread cannot be estimated; leave it out")
    if reference is not None and reference not in names:
        raise HarmonictError(f"reference batch {reference!r} is not among the batches: {', '.join(names)}")
    if features.shape[1] < 2:
        raise HarmonictError("ComBat pools over features and needs at least two, the table has one")
    for name, part in features.groupby(label):
        constant = np.ptp(part.to_numpy(), axis=0) <= 1e-12 * np.abs(part.to_numpy()).max(axis=0)
        if constant.any():
            first = features.columns[constant.argmax()]
            raise HarmonictError(
                f"feature {first!r} is constant in batch {name!r} ({int(constant.sum())} such features): its spread "
                "cannot be matched; drop it"
            )

    level = None if reference is None else names.index(reference)
    design = (code[:, None] == np.arange(len(names))).astype(float)
    if level is not None:
        design[:, level] = 1
    info = {
        "n_batch": len(names),
        "n_sample": len(features),
        "sample_per_batch": counts,
        "batch_info": [np.flatnonzero(code == n).tolist() for n in range(len(names))],
        "ref_level": level,
    }
    # neuroCombat() itself asks for np.int with a reference batch, which NumPy no longer has; its parts do not
    with contextlib.redirect_stdout(io.StringIO()), np.errstate(divide="ignore", invalid="ignore"):
        standard, mean, variance, _ = standardize_across_features(features.to_numpy().T, design, info)
        priors = fit_LS_model_and_find_priors(standard, design, info, False)
        shift, scale = find_parametric_adjustments(standard, priors, info, False)
    if not (np.isfinite(shift).all() and np.isfinite(scale).all()):
        raise HarmonictError(
            "ComBat's estimates are not finite: the features' spreads are all alike; give more features"
        )
    return Combat(
        batch=batch,
        batches=tuple(names),
        reference=reference,
        features=tuple(map(str, features.columns)),
        mean=mean[:, 0],
        sd=np.sqrt(variance[:, 0]),
        shift=shift,
        scale=scale,
        rows=tuple(int(n) for n in counts),
    )


def apply_combat(model: Combat, table: pd.DataFrame) -> pd.DataFrame:
    """The table with its features brought to the common batch; other columns, order and index stay as they are.

    Rows need not have been in the fit, their batches must. Raises HarmonictError for an unknown batch, a missing
    feature, a feature that the fit did not have, a NaN.
    """
    features = check_features(table.drop(columns=[model.batch]) if _is_column(table, model.batch) else table)
    missing = [name for name in model.features if name not in features]
    unknown = [name for name in features if name not in model.features]
    if missing or unknown:
        raise HarmonictError(
            f"the table and the ComBat fit differ in features: {len(missing)} are missing from the table, "
            f"{len(unknown)} were not fitted, the first is {(missing or unknown)[0]!r}"
        )
    label = _batch_of(table, features, model.batch)
    new = sorted(set(label.tolist()) - set(model.batches))
    if new:
        raise HarmonictError(
            f"batch {', '.join(map(repr, new))} of {model.batch!r} was not in the ComBat fit, which knows "
            f"{', '.join(model.batches)}; fit again with rows of it"
        )
    row = np.searchsorted(model.batches, label)
    standard = (features[list(model.features)].to_numpy() - model.mean) / model.sd
    aligned = (standard - model.shift[row]) / np.sqrt(model.scale[row]) * model.sd + model.mean
    if model.reference is not None:
        same = label == model.reference
        aligned[same] = features[list(model.features)].to_numpy()[same]
    out = table.copy()
    if len(features) != len(out):  # rows without any value pass through
        full = np.full((len(out), len(model.features)), np.nan)
        full[out[list(model.features)].notna().any(axis=1).to_numpy()] = aligned
        aligned = full
    for n, name in enumerate(model.features):
        out[name] = aligned[:, n]
    return out


def save_combat(model: Combat, path: str | Path) -> None:
    """Write the estimates as JSON, whole or not at all."""
    arrays = {name: getattr(model, name).tolist() for name in ("mean", "sd", "shift", "scale")}
    lists = {name: list(getattr(model, name)) for name in ("batches", "features", "rows")}
    content = {"format": FORMAT, "batch": model.batch, "reference": model.reference, **lists, **arrays}
    text = json.dumps(content, indent=1, allow_nan=False)
    write_whole(path, lambda name: Path(name).write_text(text))


def load_combat(path: str | Path) -> Combat:
    """Read what `save_combat` wrote. Raises HarmonictError where the file is not there or is something else."""
    try:
        content = json.loads(Path(path).read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        model = Combat(
            batch=content["batch"],
            batches=tuple(content["batches"]),
            reference=content["reference"],
            features=tuple(content["features"]),
            mean=np.asarray(content["mean"], np.float64),
            sd=np.asarray(content["sd"], np.float64),
            shift=np.asarray(content["shift"], np.float64),
            scale=np.asarray(content["scale"], np.float64),
            rows=tuple(content["rows"]),
        )
        shape = (len(model.batches), len(model.features))
        if not (model.mean.shape == model.sd.shape == shape[1:] and model.shift.shape == model.scale.shape == shape):
            raise ValueError("sizes do not agree")
        return model
    except OSError as error:
        raise HarmonictError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise HarmonictError(
            f"{path} holds no ComBat estimates of harmonict ({' '.join(str(error).split())})"
        ) from None


def _is_column(table: pd.DataFrame, batch: str) -> bool:
    return batch in table and batch not in KEYS


def _batch_of(table: pd.DataFrame, features: pd.DataFrame, batch: str) -> np.ndarray:
    """The batch of each row of the checked features, as text."""
    if batch in features.index.names:
        return features.index.get_level_values(batch).to_numpy(str)
    columns = table.reset_index() if any(name is not None for name in table.index.names) else table
    if batch not in columns:
        known = ", ".join(str(c) for c in columns if str(c) not in features)
        raise HarmonictError(f"the feature table has no column {batch!r} to take batches from; there are: {known}")
    keys = pd.MultiIndex.from_frame(columns[list(KEYS)].astype(str))
    values = pd.Series(columns[batch].to_numpy(), index=keys).loc[features.index]
    if values.isna().any():
        raise HarmonictError(
            f"{int(values.isna().sum())} rows of the feature table have no batch in column "
            f"{batch!r}; leave them out of the table, or choose a column that all rows have (scan, say)"
        )
    return values.astype(str).to_numpy(str)
