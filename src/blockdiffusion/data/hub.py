"""The parquet files of a named data set on the Hugging Face hub, complete or refused.

They are on the repository's main branch, or else on `refs/convert/parquet`, to which the hub itself
converts the older sets that are built by a script.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from blockdiffusion.data.registry import DataSet, split_of
from blockdiffusion.data.sources import Parquet, import_arrow
from blockdiffusion.errors import UserError

BRANCHES = ("main", "refs/convert/parquet")


@functools.cache
def fetch_split(data_set: DataSet, split: str) -> list[Path]:
    """Download the parquet files of a split into the hub's cache; return them in order.

    The cache holds only complete files, and an interrupted download resumes. All files are of one
    commit, and their rows are counted. If the hub cannot be reached, cached files are used if their
    number of rows shows that they are complete.

    Raises:
        UserError: the hub cannot be reached, has no such files, or not as many rows.
    """
    import_arrow(data_set.name)  # fails before the download
    try:
        files = _download(data_set, split)
    except Exception as error:  # the library and the network raise errors of a hundred classes
        files = _in_cache(data_set, split)
        if files and _rows(files, data_set) == expected_rows(data_set, split):
            return files
        reason = re.split(r"\n|\. ", str(error).strip())[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"the data set {data_set.name} cannot be fetched from {data_set.repository} on the "
            f"Hugging Face hub ({reason}): try again when the network is there (it resumes where "
            f"it stopped), or name local files as {data_set.name}=PATH"
        ) from error
    local = f"name local files as {data_set.name}=PATH"
    if not files:
        raise UserError(
            f"{data_set.repository} on the Hugging Face hub has no parquet files of the split "
            f"{split} in {' or '.join(data_set.folders)}, neither on its main branch nor on "
            f"{BRANCHES[1]}: {local}"
        )
    found, expected = _rows(files, data_set), expected_rows(data_set, split)
    if expected not in (found, None):
        raise UserError(
            f"{data_set.repository} on the Hugging Face hub has {found:,} rows, but {split} of "
            f"{data_set.name} has {expected:,}: it is another set, or a part of this one; {local}"
        )
    return files


def expected_rows(data_set: DataSet, split: str) -> int | None:
    """Return the number of rows of the files that hold a split; None if unknown."""
    counts = data_set.splits.values() if data_set.is_one_body else [data_set.splits[split]]
    return None if None in counts else sum(count or 0 for count in counts)


def files_of_split(names: Iterable[str], data_set: DataSet, split: str) -> list[str]:
    """Return the files of a repository that hold a split, from the first folder that has some.

    All of a set that is published as one is in the split `train`, or in files that name no split.
    """
    wanted = "train" if data_set.is_one_body else split
    parquet = sorted(name for name in names if name.endswith(".parquet"))
    for folder in data_set.folders:
        below = [name for name in parquet if name.startswith(f"{folder}/")]
        found = {name: split_of(PurePosixPath(name).relative_to(folder)) for name in below}
        if chosen := [name for name, of in found.items() if of == wanted]:
            return chosen
        if wanted == "train" and not any(found.values()) and below:
            return below
    return []


def _download(data_set: DataSet, split: str) -> list[Path]:
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    for branch in BRANCHES:
        try:
            found = huggingface_hub.HfApi().dataset_info(data_set.repository, revision=branch)
        except RevisionNotFoundError:
            continue
        names = [file.rfilename for file in found.siblings or ()]
        if chosen := files_of_split(names, data_set, split):
            get = functools.partial(huggingface_hub.hf_hub_download, data_set.repository)
            return [Path(get(name, repo_type="dataset", revision=found.sha)) for name in chosen]
    return []


def _in_cache(data_set: DataSet, split: str) -> list[Path]:
    """Return the cached files of the split, of the commit that has the most of them.

    There are none for a set of unknown size, as they may be incomplete.
    """
    import huggingface_hub

    if expected_rows(data_set, split) is None:
        return []
    try:
        repositories = huggingface_hub.scan_cache_dir().repos
    except huggingface_hub.CacheNotFound:
        return []
    best: list[Path] = []
    for repository in repositories:
        if (repository.repo_type, repository.repo_id) != ("dataset", data_set.repository):
            continue
        for revision in repository.revisions:
            paths = {
                file.file_path.relative_to(revision.snapshot_path).as_posix(): file.file_path
                for file in revision.files
            }
            chosen = files_of_split(paths, data_set, split)
            best = max(best, [paths[name] for name in chosen], key=len)
    return best


def _rows(files: Iterable[Path], data_set: DataSet) -> int:
    return sum(Parquet(str(file), file, data_set.field).num_rows() for file in files)
