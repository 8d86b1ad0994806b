"""Query and retrieve (PS3.4 C): `scp.py` answers for what the node holds, `fetch.py` brings what others hold.

`identifier.py` stands between C-FIND identifiers and the catalog, which is that of DICOMweb (`node/web/catalog.py`).
"""
