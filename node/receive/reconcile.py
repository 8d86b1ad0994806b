"""After a crash: what lies on disk and what the index says are made one again, before anything is received."""

from node.index import Index


def reconcile(index: Index) -> int:
    """Removes files that no index row names, which a crash left before they were acknowledged; returns how many."""
    strays = [
        path
        for folder in index.data_dir.glob("instances/*")
        for path in set(folder.glob("*.dcm")) - set(index.instance_paths(folder.name))
    ]
    for path in strays:
        path.unlink()
    return len(strays)
