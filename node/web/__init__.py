"""The HTTP side: a DICOMweb server over what the node holds, and OHIF on it, in a process of its own.

`server.py` is the process, `app.py` the addresses; `stow.py`, `qido.py` and `wado.py` answer them. `multipart.py` and
`accept.py` are the parts of HTTP that DICOMweb leans on.
"""
