"""The door to the model: everything `node/` and `training/` may use of it.

Importing it does not import torch; `load_pipeline` does.
"""
