"""The data sets that scikit-learn carries with it: no download."""

import numpy as np

from curvax.cli._dataset import Dataset, finish, split_numbers, split_rows
from curvax.cli._options import Options

# Part of the training labels of the digits that is made wrong unless --corrupt says otherwise.
DIGITS_CORRUPTION = 0.3


def load_bundled(options: Options) -> Dataset:
    """One of the bundled data sets.

    Args:
        options: Name, splits, corruption.

    Returns:
        The data set. Digits: 1797 images of 8 by 8 pixels, scaled to [0, 1]. The others: each input with
        mean 0 and standard deviation 1 on the training rows.

    Raises:
        UsageError: If options and data do not go together.
    """
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{options.data}")()
    x, is_digits = np.asarray(bunch.data, np.float64), options.data == "digits"
    classes: tuple[str, ...]
    y: np.ndarray
    if options.data == "diabetes":
        task, classes = "regression", ()
        y = np.asarray(bunch.target, np.float64)
        train, validation, test = split_numbers(y, options.split, options.seed)
    else:
        task, classes = "classification", tuple(str(name) for name in bunch.target_names)
        y = np.asarray(bunch.target, np.int64)
        train, validation, test = split_rows(y, options.split, options.seed)
    if is_digits:
        x = x / 16.0
    else:
        x = (x - x[train].mean(0)) / x[train].std(0)
    kind = "image" if is_digits else "row"
    data = Dataset(
        name=options.data,
        task=task,
        x=x,
        y=y,
        classes=classes,
        inputs=tuple(str(name).replace("_", " ") for name in bunch.feature_names),
        train=train,
        validation=validation,
        test=test,
        given=y[train],
        corrupted=None,
        places=tuple(f"{kind} {i}" for i in range(len(y))),
        image_shape=(8, 8) if is_digits else None,
        target={"digits": "digit", "diabetes": "disease progression"}.get(options.data, "class"),
        digest=f"scikit-learn {options.data}",
        notes=(),
    )
    return finish(data, options)
