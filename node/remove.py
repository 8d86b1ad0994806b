"""Files of cases that nothing needs any more: deleted cases, and results that newer ones took the place of."""

import contextlib
import shutil

from node.case import Case, CaseState
from node.index import Index


def delete_case(index: Index, case: Case) -> bool:
    """Removes a case: its rows, then its Instances and results. False if it changed since the snapshot.

    Raises:
        OSError: a file cannot be removed; it is a stray now, and goes at the next start of the node.
    """
    paths = index.delete_case(case)
    if paths is None:
        return False
    # One by one, by the names that were deleted: the Series may be arriving again.
    for path in paths:
        path.unlink(missing_ok=True)
    for folder in {path.parent for path in paths}:
        with contextlib.suppress(OSError):  # something new is in it
            folder.rmdir()
    shutil.rmtree(index.data_dir / "cases" / case.series_instance_uid, ignore_errors=True)
    return True


def remove_superseded(index: Index, series_instance_uid: str) -> None:
    """Removes result folders of a Series that neither its case nor anything on its way out refers to."""
    case = index.case(series_instance_uid)
    folder = index.data_dir / "cases" / series_instance_uid
    if case is None:  # deleted while it was analysed
        shutil.rmtree(folder, ignore_errors=True)
    elif case.state is not CaseState.ANALYSING:  # else a worker may have just written what is not noted yet
        for results in set(folder.glob("[!.]*")) - index.referenced_results(case):
            shutil.rmtree(results, ignore_errors=True)


def remove_strays(index: Index) -> None:
    """Removes result folders of cases that are no more, which a crash left."""
    known = {case.series_instance_uid for case in index.cases()}
    for folder in index.data_dir.glob("cases/*"):
        if folder.name not in known:
            shutil.rmtree(folder, ignore_errors=True)
