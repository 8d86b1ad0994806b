"""What speaks to an Orthanc as a client (`client.py`), and what runs inside one: `cspine.lua`, `cspine_plugin.py`.

Knows nothing of the node's insides; `node/watch` is its user.
"""
