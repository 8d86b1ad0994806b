"""The steps of `cspine-train` on a cache of real studies, each one script: segment, regions, classify, study,
calibrate, export. Lightning trains; the networks are `model.networks`, the data are `training.rsna`.
"""
